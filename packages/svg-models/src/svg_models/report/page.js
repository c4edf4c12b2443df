(() => {
  const root = document.documentElement;
  const button = document.querySelector("[data-theme-button]");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const paint = () => {
    const theme = chosen || (dark.matches ? "dark" : "light");
    root.dataset.theme = theme;
    if (button) button.textContent = theme === "dark" ? "Light mode" : "Dark mode";
  };
  dark.addEventListener("change", paint);
  if (button) button.addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    paint();
  });
  paint();

  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", async () => {
      const pre = button.parentElement.querySelector("pre");
      try {
        await navigator.clipboard.writeText(pre.textContent);
      } catch {  // a page from a file may not have the clipboard
        getSelection().selectAllChildren(pre);
        document.execCommand("copy");
      }
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }

  const download = (link, blob) => {
    link.href = URL.createObjectURL(blob);
    link.hidden = false;
  };
  const numbers = document.getElementById("data");
  for (const link of document.querySelectorAll("[data-numbers]"))
    download(link, new Blob([numbers.textContent], { type: "application/json" }));

  const goTo = [];  // what a click on a plot over frames does; filled where there are clips

  // Plots: values where the pointer is, and the frame that is shown.
  const svgNode = (name, parent) =>
    parent.appendChild(document.createElementNS(document.querySelector("svg").namespaceURI, name));
  const line = (svg, [, , top, bottom], kind) => {
    const node = svgNode("line", svg);
    node.setAttribute("class", kind);
    node.setAttribute("y1", top);
    node.setAttribute("y2", bottom);
    node.style.visibility = "hidden";
    return node;
  };
  const place = (node, x) => {
    node.setAttribute("x1", x);
    node.setAttribute("x2", x);
    node.style.visibility = "visible";
  };
  const percent = (value) => (value === null ? "not run" : `${(100 * value).toFixed(1)} %`);
  const plots = [...document.querySelectorAll("[data-plot]")].map((svg) => {
    const data = JSON.parse(svg.dataset.plot);
    const figure = svg.closest(".plot");
    const tip = figure.appendChild(document.createElement("div"));
    tip.className = "tip num";
    tip.hidden = true;
    const count = data.kind === "lines" ? Math.max(0, ...data.values.map((v) => v.length)) : data.values.length;
    const toX = (value) => data.box[0] + ((value - data.x[0]) / (data.x[1] - data.x[0])) * (data.box[1] - data.box[0]);
    const mark = line(svg, data.box, "mark-x");
    const now = data.kind === "lines" ? line(svg, data.box, "now") : null;
    const at = (event) => {
      const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
      const x = ((event.clientX - box.left) / box.width) * view.width;
      const y = ((event.clientY - box.top) / box.height) * view.height;
      const across = data.x[0] + ((x - data.box[0]) / (data.box[1] - data.box[0])) * (data.x[1] - data.x[0]);
      const down = data.y[1] + ((y - data.box[2]) / (data.box[3] - data.box[2])) * (data.y[0] - data.y[1]);
      return [Math.round(across), Math.round(down)];
    };
    const says = (column, row) => {
      if (data.kind === "lines")
        return [`frame ${column}`, ...data.labels.map((label, i) => {
          const value = data.values[i][column - 1];
          const digits = data.unit === "dB" ? 1 : 3;
          return `${label}: ${value === null || value === undefined ? "identical" : value.toFixed(digits)}`;
        })].join("\n");
      if (data.kind === "bars") {
        const whole = data.whole ? ` of ${data.whole[column - 1].toFixed(3)} s` : "";
        return `step ${column}\nattention ${data.values[column - 1].toFixed(3)} s${whole}`;
      }
      const cells = data.values[column - 1];
      return row >= 1 && row <= cells.length ? `${data.across} ${column}, layer ${row}\n${percent(cells[row - 1])}` : "";
    };
    const nearest = (event) => {
      const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
      const toY = (value) => data.box[2] + ((data.y[1] - value) / (data.y[1] - data.y[0])) * (data.box[3] - data.box[2]);
      const x = ((event.clientX - box.left) / box.width) * view.width;
      const y = ((event.clientY - box.top) / box.height) * view.height;
      const away = data.values.map(([a, b]) => Math.hypot(toX(a) - x, toY(b) - y));
      const found = away.indexOf(Math.min(...away));
      return away[found] < 12 ? data.labels[found] : "";
    };
    const show = (event) => {
      const [column, row] = at(event);
      const within = column >= 1 && column <= count;
      const text = data.kind === "points" ? nearest(event) : within ? says(column, row) : "";
      tip.hidden = !text;
      if (!text) { mark.style.visibility = "hidden"; return; }
      if (data.kind === "lines" || data.kind === "bars") place(mark, toX(column));
      tip.textContent = text;
      const box = figure.getBoundingClientRect();
      const x = event.clientX - box.left, y = event.clientY - box.top;
      tip.style.left = `${Math.max(4, Math.min(x + 14, box.width - tip.offsetWidth - 4))}px`;
      tip.style.top = `${Math.max(4, y - tip.offsetHeight - 10)}px`;
    };
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerleave", () => { tip.hidden = true; mark.style.visibility = "hidden"; });
    if (data.kind === "lines")
      svg.addEventListener("click", (event) => {
        const [column] = at(event);
        if (column >= 1 && column <= count) goTo.forEach((go) => go(column - 1));
      });
    return { now, toX };
  });

  const stage = document.querySelector("[data-stage]");
  if (!stage) return;
  const fps = Number(stage.dataset.fps), frames = Number(stage.dataset.frames);
  const clips = [...stage.querySelectorAll(".clip")].map((box) => ({
    box,
    video: box.querySelector("video"),
    canvas: box.querySelector("canvas"),
    live: box.querySelector("[data-live]"),
    psnr: JSON.parse(box.dataset.psnr || "null"),
  }));
  const lead = clips[0].video;
  const scrub = stage.querySelector("[data-scrub]");
  const label = stage.querySelector("[data-frame]");
  const play = stage.querySelector(".play");
  const rate = stage.querySelector("[data-rate]");
  const gain = stage.querySelector("[data-gain]");

  // Blobs seek exactly in every browser, data addresses do not.
  for (const { box, video } of clips) {
    const bytes = atob(video.getAttribute("src").split(",")[1]);
    const blob = new Blob([Uint8Array.from(bytes, (c) => c.charCodeAt(0))], { type: "video/mp4" });
    video.src = URL.createObjectURL(blob);
    download(box.querySelector("[data-clip]"), blob);
  }

  const frameNow = () => Math.min(frames - 1, Math.max(0, Math.floor(lead.currentTime * fps + 1e-3)));
  const seek = (frame) => clips.forEach(({ video }) => { video.currentTime = (frame + 0.5) / fps; });
  const playing = () => stage.classList.contains("playing");
  const stopAt = (frame) => {
    if (playing()) setPlaying(false);
    seek(frame);
  };
  goTo.push(stopAt);

  function setPlaying(on) {
    stage.classList.toggle("playing", on);
    play.setAttribute("aria-label", on ? "Pause all clips" : "Play all clips");
    clips.forEach(({ video }) => {
      video.playbackRate = Number(rate.value);
      if (on) video.play().catch(() => stage.classList.remove("playing"));
      else video.pause();
    });
    if (!on) seek(frameNow());
  }

  function fit(canvas, video) {
    if (canvas.width === video.videoWidth) return;
    canvas.width = video.videoWidth;
    canvas.height = video.videoHeight;
  }

  function drawDifference() {
    for (const { video, canvas } of clips) {
      if (!canvas || !video.videoWidth) continue;
      fit(canvas, video);
      const pen = canvas.getContext("2d");
      pen.globalCompositeOperation = "source-over";
      pen.drawImage(lead, 0, 0, canvas.width, canvas.height);
      pen.globalCompositeOperation = "difference";
      pen.drawImage(video, 0, 0, canvas.width, canvas.height);
    }
  }

  const wipe = stage.querySelector("[data-wipe]");
  const split = wipe && wipe.querySelector("[data-split]");
  function drawWipe() {
    const canvas = wipe.querySelector("canvas");
    const left = clips[Number(wipe.querySelector("[data-left]").value)].video;
    const right = clips[Number(wipe.querySelector("[data-right]").value)].video;
    if (!left.videoWidth || !right.videoWidth) return;
    fit(canvas, left);
    const pen = canvas.getContext("2d"), edge = Math.round((canvas.width * split.value) / 1000);
    pen.drawImage(right, 0, 0, canvas.width, canvas.height);
    if (edge > 0) pen.drawImage(left, 0, 0, edge, canvas.height, 0, 0, edge, canvas.height);
    pen.fillStyle = "#fff";
    pen.fillRect(edge - 1, 0, 2, canvas.height);
  }
  if (wipe) {
    const canvas = wipe.querySelector("canvas");
    const drag = (event) => {
      if (event.type === "pointermove" && !event.buttons) return;
      const box = canvas.getBoundingClientRect();
      split.value = Math.round((1000 * (event.clientX - box.left)) / box.width);
    };
    canvas.addEventListener("pointerdown", drag);
    canvas.addEventListener("pointermove", drag);
  }

  for (const button of stage.querySelectorAll("[data-enlarge]")) {
    const screen = button.parentElement;
    button.addEventListener("click", () => {
      const picture = screen.querySelector("video, canvas");
      screen.style.setProperty("--aspect", (picture.videoWidth || picture.width) / (picture.videoHeight || picture.height));
      if (document.fullscreenElement) document.exitFullscreen();
      else if (screen.requestFullscreen) screen.requestFullscreen().catch(() => screen.classList.toggle("enlarged"));
      else screen.classList.toggle("enlarged");
    });
  }

  let shown = -1;
  function tick() {
    if (playing()) {
      if (lead.ended || lead.currentTime * fps >= frames - 0.25) {
        clips.forEach(({ video }) => { video.currentTime = 0; });
        clips.forEach(({ video }) => video.play().catch(() => {}));
      } else {
        for (const { video } of clips.slice(1))
          if (Math.abs(video.currentTime - lead.currentTime) > 0.5 / fps)
            video.currentTime = lead.currentTime;
      }
    }
    const frame = frameNow();
    if (frame !== shown) {
      shown = frame;
      scrub.value = frame;
      scrub.setAttribute("aria-valuetext", `frame ${frame + 1} of ${frames}`);
      label.textContent = `frame ${frame + 1} / ${frames}`;
      for (const { live, psnr } of clips)
        if (live && psnr) live.textContent = psnr[frame] === null ? "identical" : `${psnr[frame].toFixed(1)} dB`;
      for (const { now, toX } of plots) if (now) place(now, toX(frame + 1));
    }
    if (gain.value !== "0") drawDifference();
    if (wipe) drawWipe();
    requestAnimationFrame(tick);
  }

  play.addEventListener("click", () => setPlaying(!playing()));
  rate.addEventListener("change", () => clips.forEach(({ video }) => { video.playbackRate = Number(rate.value); }));
  scrub.addEventListener("input", () => stopAt(Number(scrub.value)));
  gain.addEventListener("change", () => {
    stage.classList.toggle("difference", gain.value !== "0");
    stage.style.setProperty("--gain", gain.value);
  });
  for (const button of stage.querySelectorAll("[data-goto]"))
    button.addEventListener("click", () => stopAt(Number(button.dataset.goto)));
  stage.querySelector("[data-worst]").addEventListener("click", () => {
    let worst = 0, least = 1e9;
    for (const { psnr } of clips)
      (psnr || []).forEach((value, frame) => {
        if (value !== null && value < least) [worst, least] = [frame, value];
      });
    stopAt(worst);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape")
      document.querySelectorAll(".screen.enlarged").forEach((screen) => screen.classList.remove("enlarged"));
    if (event.target.closest("button, input, select, summary, a")) return;
    if (event.key === " ") { event.preventDefault(); setPlaying(!playing()); }
    if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
      event.preventDefault();
      const move = event.key === "ArrowRight" ? 1 : -1;
      stopAt(Math.min(frames - 1, Math.max(0, frameNow() + move)));
    }
  });
  requestAnimationFrame(tick);
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) setPlaying(true);
})();
