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

  const stage = document.querySelector("[data-stage]");
  if (!stage) return;
  const fps = Number(stage.dataset.fps), frames = Number(stage.dataset.frames);
  const clips = [...stage.querySelectorAll(".clip")].map((box) => ({
    video: box.querySelector("video"),
    canvas: box.querySelector("canvas"),
    live: box.querySelector("[data-live]"),
    psnr: JSON.parse(box.dataset.psnr || "null"),
  }));
  const lead = clips[0].video;
  const scrub = stage.querySelector("input[type=range]");
  const label = stage.querySelector("[data-frame]");
  const play = stage.querySelector(".play");
  const rate = stage.querySelector("select");
  const difference = stage.querySelector("[data-difference]");

  // Blobs seek exactly in every browser, data addresses do not.
  for (const { video } of clips) {
    const bytes = atob(video.getAttribute("src").split(",")[1]);
    const array = Uint8Array.from(bytes, (c) => c.charCodeAt(0));
    video.src = URL.createObjectURL(new Blob([array], { type: "video/mp4" }));
  }

  const frameNow = () => Math.min(frames - 1, Math.max(0, Math.floor(lead.currentTime * fps + 1e-3)));
  const seek = (frame) => clips.forEach(({ video }) => { video.currentTime = (frame + 0.5) / fps; });
  const playing = () => stage.classList.contains("playing");

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

  function drawDifference() {
    for (const { video, canvas } of clips) {
      if (!canvas || !video.videoWidth) continue;
      if (canvas.width !== video.videoWidth) {
        canvas.width = video.videoWidth;
        canvas.height = video.videoHeight;
      }
      const pen = canvas.getContext("2d");
      pen.globalCompositeOperation = "source-over";
      pen.drawImage(lead, 0, 0, canvas.width, canvas.height);
      pen.globalCompositeOperation = "difference";
      pen.drawImage(video, 0, 0, canvas.width, canvas.height);
    }
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
    }
    if (stage.classList.contains("difference")) drawDifference();
    requestAnimationFrame(tick);
  }

  play.addEventListener("click", () => setPlaying(!playing()));
  rate.addEventListener("change", () => clips.forEach(({ video }) => { video.playbackRate = Number(rate.value); }));
  scrub.addEventListener("input", () => {
    const frame = Number(scrub.value);
    if (playing()) setPlaying(false);
    seek(frame);
  });
  difference.addEventListener("change", () => stage.classList.toggle("difference", difference.checked));
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("button, input, select, summary, a")) return;
    if (event.key === " ") { event.preventDefault(); setPlaying(!playing()); }
    if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
      event.preventDefault();
      const move = event.key === "ArrowRight" ? 1 : -1;
      if (playing()) setPlaying(false);
      seek(Math.min(frames - 1, Math.max(0, frameNow() + move)));
    }
  });
  requestAnimationFrame(tick);
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) setPlaying(true);
})();
