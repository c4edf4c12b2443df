// An option is searched for as it is typed: the search reads a leading dash as "without", so
// `--offload` would find every page but the right ones. The field keeps what the reader wrote.
const field = document.querySelector("[data-md-component=search-query]")
if (field) {
  const { get, set } = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value")
  Object.defineProperty(field, "value", {
    get() { return get.call(this).replace(/(^|\s)-+(?=\w)/g, "$1") },
    set(text) { set.call(this, text) },
  })
}
