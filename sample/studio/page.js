// State in the browser: the painted mask, the drawn tracks, the storyboard, the list of results, the form's values, and two videos that play in step.
// Listens on the document, because Gradio may replace elements at any time.
(() => {
  const LIST = "kling-studio-list", TAB = "kling-studio-tab", FORM = "kling-studio-form", MOST = 100;
  const read = (store, key, other) => { try { return JSON.parse(store.getItem(key)) ?? other; } catch { return other; } };
  const write = (store, key, value) => { try { store.setItem(key, JSON.stringify(value)); } catch { /* storage full or forbidden */ } };
  const random = () => [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, "0")).join("");
  let tab = read(sessionStorage, TAB, null);
  if (!tab) write(sessionStorage, TAB, (tab = random()));
  const STILL = 600; // milliseconds after the last change of the form until a rough clip is asked for
  let awake = false, pending = null, still = 0;

  window.studio = {
    // The list belongs to the browser, not to the tab: it is read for every event, and only changes are written.
    withList: (v) => [...v.slice(0, -1), { ...(v.at(-1) ?? {}), ids: read(localStorage, LIST, []), tab, add: undefined, drop: undefined }],
    apply: (mine) => {
      const { add, drop, ...rest } = mine ?? {};
      if (add?.length || drop?.length) {
        const ids = [...(add ?? []), ...read(localStorage, LIST, [])].filter((id) => !(drop ?? []).includes(id));
        write(localStorage, LIST, [...new Set(ids)].slice(0, MOST));
      }
      return [rest];
    },
    // Gradio draws a tab when it is first opened: until then there is no canvas, and the restored mask is used instead.
    withMask: (v, place, tracks, story) => {
      v[place] = canvasOf() ? mask() : pending;
      if (tracks !== undefined) v[tracks] = arrows;
      if (story !== undefined) v[story] = shots;
      return v;
    },
    hold: (painted) => {
      pending = painted?.mask ?? null;
      if (painted?.tracks) { arrows = painted.tracks; show(); }
      if (painted?.shots) { shots = painted.shots; tell(); }
      return [];
    },
    // The form belongs to the tab; it is saved only after the earlier values have been restored.
    keep: (v) => { if (awake) write(sessionStorage, FORM, v); return v; },
    saved: () => read(sessionStorage, FORM, null),
    awake: () => { awake = true; return []; },
    // The wait is here and not on the server, where every letter typed would hold a request.
    soon: () => { clearTimeout(still); still = setTimeout(() => document.querySelector("#draft")?.click(), STILL); return []; },
  };
  window.addEventListener("storage", (event) => { if (event.key === LIST) document.querySelector("#refresh")?.click(); });

  // ---- the mask: strokes on a canvas, white where to generate ----

  let strokes = [], current = null, painted = null; // of the canvas `painted`
  const canvasOf = () => document.querySelector(".painter canvas");
  const tool = (name) => document.querySelector(`.painting [name=${name}]`);

  function draw(canvas, list) {
    const pen = canvas.getContext("2d");
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.lineCap = pen.lineJoin = "round";
    pen.strokeStyle = "#fff";
    for (const stroke of list) {
      if (stroke.image) { pen.drawImage(stroke.image, 0, 0, canvas.width, canvas.height); continue; }
      pen.globalCompositeOperation = stroke.erase ? "destination-out" : "source-over";
      pen.lineWidth = stroke.width;
      pen.beginPath();
      pen.moveTo(...stroke.points[0]);
      for (const point of stroke.points.length > 1 ? stroke.points.slice(1) : stroke.points) pen.lineTo(...point);
      pen.stroke();
    }
    pen.globalCompositeOperation = "source-over";
  }
  function changed() {
    if (canvasOf()) draw(canvasOf(), strokes);
    document.querySelector("#checked")?.click(); // the line that says what is wrong is said anew
  }
  function point(event) {
    const box = event.target.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * event.target.width, ((event.clientY - box.top) / box.height) * event.target.height];
  }
  const onCanvas = (event) => event.target instanceof HTMLCanvasElement && event.target.closest(".painter");
  document.addEventListener("pointerdown", (event) => {
    if (!onCanvas(event)) return;
    if (painted !== event.target) [painted, strokes] = [event.target, []];
    event.target.setPointerCapture(event.pointerId);
    const width = Math.max(2, (event.target.width * Number(tool("brush-size")?.value ?? 11)) / 100);
    strokes.push((current = { erase: !!tool("eraser")?.checked, width, points: [point(event)] }));
    draw(painted, strokes);
  });
  document.addEventListener("pointermove", (event) => {
    if (!current || !onCanvas(event) || !event.buttons) return;
    current.points.push(point(event));
    draw(painted, strokes);
  });
  for (const name of ["pointerup", "pointercancel"]) document.addEventListener(name, () => { if (current) { current = null; changed(); } });
  document.addEventListener("click", (event) => {
    const action = event.target.closest?.(".painting [data-do]")?.dataset.do;
    if (!action) return;
    strokes = action === "undo" ? strokes.slice(0, -1) : [];
    changed();
  });

  // An earlier mask becomes the first stroke: its white part, without the black.
  async function begin(canvas) {
    const picture = new Image();
    picture.src = canvas.dataset.before;
    delete canvas.dataset.before;
    await picture.decode();
    const layer = document.createElement("canvas");
    [layer.width, layer.height] = [picture.width, picture.height];
    const pen = layer.getContext("2d");
    pen.drawImage(picture, 0, 0);
    const pixels = pen.getImageData(0, 0, layer.width, layer.height);
    for (let i = 0; i < pixels.data.length; i += 4) pixels.data.set([255, 255, 255, pixels.data[i]], i);
    pen.putImageData(pixels, 0, 0);
    [painted, strokes] = [canvas, [{ image: layer }]];
    changed();
  }

  // The mask as a PNG: white is painted, black is kept. null if nothing is painted.
  function mask() {
    const canvas = canvasOf();
    if (!canvas || canvas !== painted || !strokes.length) return null;
    const out = document.createElement("canvas");
    [out.width, out.height] = [canvas.width, canvas.height];
    const pen = out.getContext("2d");
    pen.fillRect(0, 0, out.width, out.height);
    pen.drawImage(canvas, 0, 0);
    return pen.getImageData(0, 0, out.width, out.height).data.some((value, i) => i % 4 === 0 && value > 127) ? out.toDataURL("image/png") : null;
  }

  // ---- tracks: arrows over the first frame; points are shares of its width and height ----

  let arrows = [], held = null; // held: what is being drawn or dragged
  const board = () => document.querySelector(".board svg");
  const MOST_POINTS = 40, NEAR = 0.004, HANDLE = 8; // points of a track; a drag shorter than this is a click; a handle's radius in pixels

  function show() {
    const svg = board(), group = svg?.querySelector(".arrows");
    if (!group) return;
    const [w, h] = [Number(svg.dataset.w), Number(svg.dataset.h)], wide = svg.getBoundingClientRect().width; // 0 on a hidden tab
    const r = wide ? (HANDLE * w) / wide : Math.max(w, h) / 60;
    const make = (name, parent, values, text) => {
      const made = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const [key, value] of Object.entries(values)) made.setAttribute(key, value);
      if (text) made.textContent = text;
      return parent.appendChild(made);
    };
    group.replaceChildren();
    arrows.forEach(({ points }, n) => {
      const at = points.map(([x, y]) => [x * w, y * h]), [first, last] = [at[0], at.at(-1)];
      const one = make("g", group, { class: "arrow", "data-n": n });
      make("polyline", one, { points: at.map((p) => p.join()).join(" "), "stroke-width": r / 2 });
      if (at.length > 1) {
        const before = at.findLast((p) => Math.hypot(p[0] - last[0], p[1] - last[1]) > 2 * r) ?? first;
        const angle = (Math.atan2(last[1] - before[1], last[0] - before[0]) * 180) / Math.PI;
        const head = `M${1.5 * r},0 L${-r},${r} L${-r / 2},0 L${-r},${-r} Z`;
        make("path", one, { class: "end", d: head, transform: `translate(${last}) rotate(${angle})` });
      }
      make("circle", one, { class: "start", cx: first[0], cy: first[1], r });
      // The × is beside the path, on the side with more room, and never outside the picture.
      const next = at.find((p) => Math.hypot(p[0] - first[0], p[1] - first[1]) > 2 * r) ?? [first[0] + r, first[1]];
      const [u, v] = [first[1] - next[1], next[0] - first[0]], room = u * (w / 2 - first[0]) + v * (h / 2 - first[1]);
      const far = ((room < 0 ? -2.5 : 2.5) * r) / Math.hypot(u, v);
      const inside = (value, most) => Math.min(Math.max(value, 1.5 * r), most - 1.5 * r);
      make("text", one, { class: "gone", x: inside(first[0] + far * u, w), y: inside(first[1] + far * v, h), "font-size": r * 3 }, "×");
    });
  }
  function place(event) {
    const box = board().getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  }
  // The end follows the pointer, the start stays: the path between them is turned and stretched.
  function stretched(points, to) {
    const [a, b] = [points[0], points.at(-1)], [u, v] = [b[0] - a[0], b[1] - a[1]], [p, q] = [to[0] - a[0], to[1] - a[1]];
    const n = u * u + v * v;
    if (n < 1e-8) return [a, to];
    const [c, s] = [(p * u + q * v) / n, (q * u - p * v) / n];
    return points.map(([x, y]) => [a[0] + c * (x - a[0]) - s * (y - a[1]), a[1] + s * (x - a[0]) + c * (y - a[1])]);
  }
  document.addEventListener("pointerdown", (event) => {
    const svg = event.target.closest?.(".board svg");
    if (!svg) return;
    event.preventDefault();
    svg.setPointerCapture(event.pointerId);
    const n = Number(event.target.closest(".arrow")?.dataset.n ?? -1), kind = event.target.getAttribute("class");
    if (kind === "gone") { arrows = arrows.filter((_, i) => i !== n); show(); ask(); return; }
    const how = n < 0 || !["start", "end"].includes(kind) ? "new" : kind;
    if (how === "new") arrows = [...arrows, { points: [place(event)] }];
    const one = how === "new" ? arrows.at(-1) : arrows[n];
    held = { how, one, from: place(event), points: one.points };
    show();
  });
  document.addEventListener("pointermove", (event) => {
    if (!held || !board() || !event.buttons) return;
    const [x, y] = place(event), [dx, dy] = [x - held.from[0], y - held.from[1]];
    if (held.how === "new") {
      const last = held.one.points.at(-1);
      if (Math.hypot(x - last[0], y - last[1]) > NEAR) held.one.points = [...held.one.points, [x, y]];
    } else if (held.how === "start") held.one.points = held.points.map((p) => [p[0] + dx, p[1] + dy]);
    else held.one.points = stretched(held.points, [x, y]);
    show();
  });
  for (const name of ["pointerup", "pointercancel"]) document.addEventListener(name, () => {
    if (!held) return;
    const { points } = held.one, step = (points.length - 1) / (MOST_POINTS - 1);
    if (points.length > MOST_POINTS) held.one.points = Array.from({ length: MOST_POINTS }, (_, i) => points[Math.round(i * step)]);
    held = null;
    show();
    ask();
  });
  const ask = () => document.querySelector("#checked")?.click();

  // ---- the storyboard: rows of {prompt, seconds, camera} ----

  let shots = [], dragged = null; // dragged: the number of a row
  const story = () => document.querySelector(".story");
  const NEW = { prompt: "", seconds: 2.5, camera: "" };
  const changedStory = () => { ask(); window.studio.soon(); };

  // Draws all rows anew; typing in one does not, so that it keeps the cursor.
  function tell() {
    const place = story(), list = place?.querySelector("ol"), words = place?.dataset;
    if (!list) return;
    list.replaceChildren(...shots.map((shot, n) => {
      const row = document.createElement("li");
      row.draggable = true;
      row.dataset.n = n;
      const field = (kind, name, more) => {
        const made = Object.assign(document.createElement(kind), { name, value: shot[name], title: words[name === "prompt" ? "words" : name], ...more });
        made.setAttribute("aria-label", `${made.title} ${n + 1}`);
        return made;
      };
      const button = (what, sign, off) =>
        Object.assign(document.createElement("button"), { type: "button", name: what, textContent: sign, title: words[what], disabled: off });
      const grip = Object.assign(document.createElement("span"), { className: "grip", title: words.drag, textContent: "⠿" });
      const unit = Object.assign(document.createElement("span"), { className: "unit", textContent: words.unit });
      const camera = field("input", "camera", { placeholder: words.short });
      camera.setAttribute("list", "story-cameras");
      row.append(
        grip,
        field("textarea", "prompt", { rows: 2, placeholder: words.words }),
        field("input", "seconds", { type: "number", min: 0.5, step: 0.5 }),
        unit,
        camera,
        button("up", "↑", n === 0), button("down", "↓", n === shots.length - 1), button("remove", "×", false),
      );
      return row;
    }));
    place.querySelector("[data-do=add-shot]").disabled = shots.length >= Number(words.most);
  }
  function moved(from, to) {
    if (to < 0 || to >= shots.length || from === to) return;
    const rest = shots.filter((_, i) => i !== from);
    shots = [...rest.slice(0, to), shots[from], ...rest.slice(to)];
    tell();
    changedStory();
  }
  const rowOf = (event) => event.target.closest?.(".story li");
  document.addEventListener("input", (event) => {
    const row = rowOf(event), { name, value } = event.target;
    if (!row) return;
    shots = shots.map((shot, i) => (i === Number(row.dataset.n) ? { ...shot, [name]: name === "seconds" ? Number(value) : value } : shot));
    changedStory();
  });
  document.addEventListener("click", (event) => {
    const row = rowOf(event), n = Number(row?.dataset.n), what = event.target.name;
    if (row && what === "up") moved(n, n - 1);
    else if (row && what === "down") moved(n, n + 1);
    else if (row && what === "remove") { shots = shots.filter((_, i) => i !== n); tell(); changedStory(); }
    else if (event.target.closest?.("[data-do=add-shot]")) {
      shots = [...shots, { ...NEW }];
      tell();
      story().querySelector("li:last-child textarea").focus();
      changedStory();
    }
  });
  document.addEventListener("dragstart", (event) => {
    const row = rowOf(event);
    if (!row) return;
    if (event.target !== row) { event.preventDefault(); return; } // text that is marked in a field stays there
    dragged = Number(row.dataset.n);
    row.classList.add("dragged");
    event.dataTransfer.effectAllowed = "move";
  });
  const over = (row) => { for (const one of document.querySelectorAll(".story li")) one.classList.toggle("over", one === row); };
  document.addEventListener("dragover", (event) => {
    if (dragged === null) return;
    over(rowOf(event));
    if (rowOf(event)) event.preventDefault();
  });
  document.addEventListener("drop", (event) => {
    const row = rowOf(event);
    if (dragged === null || !row) return;
    event.preventDefault();
    moved(dragged, Number(row.dataset.n));
  });
  document.addEventListener("dragend", () => {
    dragged = null;
    over(null);
    document.querySelector(".story .dragged")?.classList.remove("dragged");
  });

  // ---- files dropped outside a field: load their settings ----

  const elsewhere = (event) => event.dataTransfer?.types.includes("Files") && !event.target.closest?.("#inputs, #vae-clip, .upload-container");
  document.addEventListener("dragover", (event) => { if (elsewhere(event)) event.preventDefault(); });
  document.addEventListener("drop", (event) => {
    const input = document.querySelector("input[type=file]:has(+ #restore)");
    if (!elsewhere(event) || !event.dataTransfer.files.length || !input) return;
    event.preventDefault();
    input.files = event.dataTransfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });

  // A GIF counts as a video here; Gradio's own filter accepts files by their declared type.
  const CLIPS = "#clip, #vae-clip";
  const renamed = (files) => {
    const all = new DataTransfer();
    for (const file of files) all.items.add(file.type === "image/gif" ? new File([file], file.name, { type: "video/gif" }) : file);
    return all.files;
  };
  const gif = (files) => [...files].some((file) => file.type === "image/gif");
  document.addEventListener("change", (event) => {
    if (event.target.closest?.(CLIPS) && event.target.files && gif(event.target.files)) event.target.files = renamed(event.target.files);
  }, true);
  document.addEventListener("drop", (event) => {
    const input = event.target.closest?.(CLIPS)?.querySelector("input[type=file]");
    if (!input || !event.dataTransfer || !gif(event.dataTransfer.files)) return;
    event.preventDefault();
    event.stopPropagation();
    input.files = renamed(event.dataTransfer.files);
    input.dispatchEvent(new Event("change", { bubbles: true }));
  }, true);
  const drawn = () => {
    if (canvasOf()?.dataset.before) begin(canvasOf());
    if (arrows.length && board() && !board().querySelector(".arrow")) show();
    if (shots.length && story() && !story().querySelector("li")) tell();
    for (const input of document.querySelectorAll(":is(#clip, #vae-clip) input[type=file]"))
      if (input.accept && !input.accept.includes("gif")) input.accept += ",.gif,image/gif";
  };
  new MutationObserver(drawn).observe(document.documentElement, { childList: true, subtree: true });

  // ---- two compared videos play in step ----

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
  // A video that the browser cannot play is replaced by the server's copy, or refused with a reason; hide "not playable" until then.
  document.addEventListener("error", (event) => {
    if (event.target.matches?.("#clip video, #vae-clip video")) event.stopImmediatePropagation();
  }, true);
  for (const name of ["play", "pause", "seeked", "timeupdate"]) document.addEventListener(name, follow, true);
  document.addEventListener("mouseover", (event) => event.target.closest?.(".card")?.querySelector("video")?.play());
  document.addEventListener("mouseout", (event) => event.target.closest?.(".card")?.querySelector("video")?.pause());
})();
