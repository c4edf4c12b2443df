// What is wrong with the page that is open, a line each; see look_at_site.py.
(() => {
  const wide = document.documentElement.clientWidth, said = new Set()
  const say = (what, text) => said.add(`${what}: ${text.trim().replace(/\s+/g, ' ').slice(0, 60)}`)
  const parts = colour => { const n = colour.match(/[\d.]+/g).map(Number); return [...n, 1].slice(0, 4) }
  const over = (top, under) => under.map((v, i) => v * (1 - top[3]) + top[i] * top[3])
  const light = colour => colour.map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0)
  const paper = element => {
    const layers = []
    for (let e = element; e; e = e.parentElement) layers.push(parts(getComputedStyle(e).backgroundColor))
    return layers.reduceRight((under, top) => over(top, under), [255, 255, 255])
  }
  const faded = element => {
    let share = 1
    for (let e = element; e; e = e.parentElement) share *= Number(getComputedStyle(e).opacity)
    return share
  }
  if (document.documentElement.scrollWidth > wide)
    say('wider than the screen', `${document.documentElement.scrollWidth} pixels`)
  for (const image of document.querySelectorAll('main img')) {
    if (!image.alt.trim()) say('a picture without a text', image.src)
    if (!image.naturalWidth) say('a picture that does not load', image.src)
    if (image.getBoundingClientRect().width > wide) say('a picture wider than the screen', image.src)
  }
  for (const element of document.querySelectorAll('header *, main *, footer *')) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())
    const box = element.getBoundingClientRect(), style = getComputedStyle(element)
    if (!own || !box.width || !box.height || style.visibility === 'hidden') continue
    if (element.closest('svg, .headerlink, .md-search, .md-clipboard, .md-nav__button')) continue
    const share = faded(element), ground = paper(element), ink = parts(style.color)
    if (!share) continue
    ink[3] *= share
    const [dark, bright] = [light(over(ink, ground)), light(ground)].sort((a, b) => a - b)
    const contrast = (bright + 0.05) / (dark + 0.05)
    if (contrast < 4.5) say(`contrast ${contrast.toFixed(1)} of ${element.className || element.tagName}`,
                            element.textContent)
  }
  const text = document.querySelector('main')?.innerText ?? ''
  const formula = text.match(/\$[^$\n]{0,60}\\[a-z]+/)
  if (formula) say('a formula as it was typed', formula[0])
  return [...said]
})()
