// Painting a mask, and two videos that play as one. Listens on the document: Gradio replaces the elements as it pleases.
(() => {
  const brush = (canvas) => Math.max(4, canvas.width / 9);
  let last = null;

  function point(event) {
    const box = event.target.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * event.target.width, ((event.clientY - box.top) / box.height) * event.target.height];
  }

  function stroke(event) {
    const canvas = event.target, pen = canvas.getContext("2d"), to = point(event);
    pen.strokeStyle = "#fff";
    pen.lineWidth = brush(canvas);
    pen.lineCap = "round";
    pen.beginPath();
    pen.moveTo(...(last || to));
    pen.lineTo(...to);
    pen.stroke();
    canvas.dataset.painted = "yes";
    last = to;
  }

  const onCanvas = (event) => event.target instanceof HTMLCanvasElement && event.target.closest(".painter");
  document.addEventListener("pointerdown", (event) => {
    if (!onCanvas(event)) return;
    event.target.setPointerCapture(event.pointerId);
    last = null;
    stroke(event);
  });
  document.addEventListener("pointermove", (event) => { if (onCanvas(event) && event.buttons) stroke(event); });
  document.addEventListener("pointerup", () => { last = null; });

  // The mask as a PNG: white is painted, black is kept. null if nothing was painted.
  window.studioMask = () => {
    const canvas = document.querySelector(".painter canvas");
    if (!canvas || !canvas.dataset.painted) return null;
    const out = document.createElement("canvas");
    [out.width, out.height] = [canvas.width, canvas.height];
    const pen = out.getContext("2d");
    pen.fillRect(0, 0, out.width, out.height);
    pen.drawImage(canvas, 0, 0);
    return out.toDataURL("image/png");
  };

  // What one of two compared videos does, the other does.
  const others = (video) => [...(video.closest(".compare")?.querySelectorAll("video") ?? [])].filter((other) => other !== video);
  const follow = (event) => {
    const video = event.target;
    if (!(video instanceof HTMLVideoElement)) return;
    for (const other of others(video)) {
      if (Math.abs(other.currentTime - video.currentTime) > 0.06) other.currentTime = video.currentTime;
      if (event.type === "play" && other.paused) other.play();
      if (event.type === "pause" && !other.paused) other.pause();
    }
  };
  for (const name of ["play", "pause", "seeked", "timeupdate"]) document.addEventListener(name, follow, true);
  document.addEventListener("mouseover", (event) => event.target.closest?.(".card")?.querySelector("video")?.play());
  document.addEventListener("mouseout", (event) => event.target.closest?.(".card")?.querySelector("video")?.pause());
})();
