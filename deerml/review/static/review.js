// The browser side of a review: frames and boxes come in, verdicts go out.
//
// One module without a build step, because a notebook loads exactly one file. It has two hosts with the same messages:
// anywidget, and the page of the server. Nothing here decides what is true: a key press becomes an explicit list of
// boxes and statements, Python checks and records it. What lies here is what a person feels: the next picture is on
// the screen before the verdict is stored, and nothing is judged that was not on the screen.

const DWELL_MS = 100; // a picture counts as seen when it has been on the screen for this long
const ITEMS_AHEAD = 3;
const FRAMES_AHEAD = 8;
const ITEMS_BEHIND = 10; // how far undo goes without loading
const BYTES_KEPT = 32 * 2 ** 20;
const THUMB_WIDTH = 240; // pixels of a thumbnail, twice what it takes on the screen
const RESEND_MS = 5000; // an operation that nobody has answered for this long is sent again
const ADJUST_MS = 500; // a nudged box is sent when the arrows have rested for this long
const SMALLEST_BOX = 3; // screen pixels; less is a slip of the hand
const MOST_ZOOM = 16;
const FLIP_MS = 250;
const STAYS_MS = 400; // from here on somebody looks at an item closely
const SURVIVES = (box) => box.word !== "false_positive";

// Every action is here once: the buttons, the keys and the help are made from this table.
const ACTIONS = {
  correct: { key: "C", label: "Correct", icon: "check", help: "Every box is right and nothing is missing" },
  wrong: { key: "F", label: "Wrong", icon: "cross", help: "Every box is wrong; then: nothing here?" },
  nothing: { key: "N", label: "Nothing", icon: "empty", help: "No animal on any frame" },
  missed: { key: "M", label: "Missed", icon: "draw", help: "Draw an animal that has no box" },
  boxed: { key: "B", label: "All boxed", icon: "boxed", help: "With the boxes as they are now, nothing is missing" },
  skip: { key: "S", label: "Skip", icon: "skip", help: "Not sure: leave it to somebody else" },
  undo: { key: "Z", label: "Undo", icon: "undo", help: "Take the last verdict back" },
  zoomIn: { key: "+", label: "Zoom in", icon: "plus", help: "Zoom in; original pixels from there on" },
  zoomOut: { key: "-", label: "Zoom out", icon: "minus", help: "Zoom out" },
  fit: { key: "0", label: "Whole frame", icon: "fit", help: "The whole frame again" },
  boxes: { key: "H", label: "Hide boxes", icon: "eye", help: "Hide or show the boxes" },
  scores: { key: "X", label: "Hide scores", icon: "score", help: "Hide or show the model's scores" },
  play: { key: "P", label: "Flip-book", icon: "play", help: "Play the strip as a flip-book" },
  grid: { key: "G", label: "Grid", icon: "grid", help: "Many boxes of one score on a page, and back" },
  help: { key: "?", label: "Help", icon: "help", help: "This list" },
};
const ALIASES = { u: "skip", "=": "zoomIn", _: "zoomOut" };
const BAR = ["correct", "wrong", "nothing", "missed", "boxed", "skip", "undo"];
const TOOLS = ["zoomOut", "fit", "zoomIn", "boxes", "scores", "play"];
const MORE_HELP = [
  ["← →", "The frames of the strip"],
  ["Shift + key", "The verdict counts for this frame alone"],
  ["Tab", "Select the next box; Shift + Tab the one before"],
  ["Shift + C, F", "The selected box alone is right, is wrong"],
  ["Arrows, Alt + ←", "Move, resize the selected box; Shift for larger steps"],
  ["Delete", "Remove a drawn box; mark a found one wrong"],
  ["Enter", "While drawing: a box in the middle, for the arrows"],
  ["1 – 9", "The class of the box; in the grid: the exception"],
  ["Space, Enter", "In the grid: toggle the exception, confirm the page"],
  ["Esc", "Leave drawing, the selection, then the review"],
];
const KEYS = { ...ALIASES };
for (const [name, action] of Object.entries(ACTIONS)) KEYS[action.key.toLowerCase()] = name;

const ICONS = {
  check: "M5 12.5l4.5 4.5L19 7.5",
  cross: "M6.5 6.5l11 11M17.5 6.5l-11 11",
  empty: "M12 4a8 8 0 100 16 8 8 0 000-16zM6.5 17.5l11-11",
  draw: "M5 9V5h4M15 5h4v4M19 15v4h-4M9 19H5v-4M12 9v6M9 12h6",
  boxed: "M5 5h14v14H5zM8.5 12l2.5 2.5 4.5-5",
  skip: "M6 6l6 6-6 6M13 6l6 6-6 6",
  undo: "M9 6L5 10l4 4M5 10h9a5 5 0 010 10h-3",
  plus: "M12 6v12M6 12h12",
  minus: "M6 12h12",
  fit: "M5 9V5h4M15 5h4v4M19 15v4h-4M9 19H5v-4",
  eye: "M3.5 12c4-7.5 13-7.5 17 0-4 7.5-13 7.5-17 0zM12 9.5a2.5 2.5 0 100 5 2.5 2.5 0 000-5z",
  score: "M6 19v-6M12 19V5M18 19v-9",
  play: "M8 5.5l10 6.5-10 6.5z",
  grid: "M5 5h5.5v5.5H5zM13.5 5H19v5.5h-5.5zM5 13.5h5.5V19H5zM13.5 13.5H19V19h-5.5z",
  help: "M9 9.5a3 3 0 116 0c0 2-3 2.2-3 4.5M12 17.5v.5",
  strip: "M4 5h16v9H4zM4 18h3M10.5 18h3M17 18h3",
  single: "M4 5h16v14H4z",
  bin: "M5 7h14M9 7V5h6v2M7 7l1 12h8l1-12",
  one: "M4 6h16v12H4zM11 10l1.5-1v6",
  differ: "M6 9h12M6 15h12M15 5L9 19",
  dots: "M6 12h.5M12 12h.5M18 12h.5",
  alert: "M12 5v9M12 18v.5",
};

// What is known of a frame, in a word, an icon and a class for its colour: never by colour alone.
const MARKS = {
  all_boxed: ["boxed", "all boxed"],
  boxes_complete: ["boxed", "all boxed"],
  nothing_here: ["empty", "nothing here"],
  verified_empty: ["empty", "nothing here"],
  unsure: ["skip", "skipped"],
  exclude: ["cross", "left out"],
  disputed: ["differ", "disputed"],
  in_progress: ["dots", "begun"],
};
const WORDS = { correct: "right", adjusted: "adjusted", false_positive: "wrong", missed: "missed" };
const PROBLEMS = { gone: "The image of this frame is gone", broken: "The image of this frame cannot be read" };

// -- small helpers ------------------------------------------------------------------------------------------------

function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const icon = (name) =>
  svg("svg", { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true" }, svg("path", { d: ICONS[name] }));
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const rounded = (box) => box.map((value) => Math.round(value * 100) / 100);
const plural = (count, word, many = `${word}s`) => `${count} ${count === 1 ? word : many}`;
const wantsStill = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
const frameKey = (id) => `frame:${id}`;
const cropKey = (id) => `crop:${id}`;

// `crypto.randomUUID` exists on secure origins only, and a server on the home network has none.
function uuid() {
  const hex = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}

// `first` runs when the frame with the change has been handed to the screen, `second` one frame later: by then it is
// certain that it has been shown.
function afterPaint(first, second) {
  requestAnimationFrame(() => {
    const channel = new MessageChannel();
    channel.port1.onmessage = () => first(performance.now());
    channel.port2.postMessage(null);
    requestAnimationFrame(() => second(performance.now()));
  });
}

const isTyping = (node) => node.matches?.("input, textarea, select, [contenteditable]:not([contenteditable=false])");

// -- pictures: decoded before they are needed, within a budget --------------------------------------------------

class Pictures {
  constructor(onReady, onBroken) {
    Object.assign(this, { onReady, onBroken, held: new Map(), asked: new Map() });
  }

  get(key) {
    return this.held.get(key);
  }

  // The large picture of an item is decoded `whole` before it counts as ready; of the others only the thumbnail is, and
  // the rest when somebody stays: decoding ten frames for one verdict would cost more than showing it.
  async add(key, message, buffer, whole) {
    const blob = new Blob([buffer], { type: message.media_type });
    const url = URL.createObjectURL(blob);
    const image = new Image();
    // Decoded already; "sync" keeps the browser from showing the frame's box one frame before its picture.
    Object.assign(image, { decoding: "sync", alt: "", draggable: false, src: url });
    const before = this.held.get(key);
    try {
      if (whole || key.startsWith("crop:")) await image.decode();
      const thumb = before?.thumb ?? (key.startsWith("frame:") ? await thumbnail(blob) : null);
      if (before?.full && !message.full) return URL.revokeObjectURL(url);
      this.drop(key);
      this.held.set(key, { url, image, thumb, full: Boolean(message.full), bytes: blob.size });
      this.asked.delete(key);
      this.onReady(key);
    } catch (error) {
      URL.revokeObjectURL(url);
      this.onBroken(key, String(error.message || error));
    }
  }

  drop(key, { keepThumb = false } = {}) {
    const held = this.held.get(key);
    if (!held) return;
    if (held.url) URL.revokeObjectURL(held.url);
    this.held.delete(key);
    if (keepThumb && held.thumb) this.held.set(key, { thumb: held.thumb, bytes: 0 });
  }

  // `order` names what is worth keeping, the dearest first. Thumbnails of it stay: they are small.
  keepOnly(order) {
    let room = BYTES_KEPT;
    const wanted = new Set(order);
    for (const key of [...this.held.keys()]) if (!wanted.has(key)) this.drop(key);
    for (const key of order) {
      const bytes = this.held.get(key)?.bytes ?? 0;
      if (bytes > room) this.drop(key, { keepThumb: true });
      else room -= bytes;
    }
  }

  // Not more than one question a few seconds for one picture
  mayAsk(key) {
    const now = performance.now();
    if (now - (this.asked.get(key) ?? -Infinity) < RESEND_MS) return false;
    this.asked.set(key, now);
    return true;
  }
}

async function thumbnail(blob) {
  const bitmap = await createImageBitmap(blob, { resizeWidth: THUMB_WIDTH, resizeQuality: "medium" });
  const canvas = Object.assign(document.createElement("canvas"), { width: bitmap.width, height: bitmap.height });
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  bitmap.close();
  return canvas;
}

// -- outbox: operations that nobody has acknowledged yet ----------------------------------------------------------

class Outbox {
  constructor(send) {
    Object.assign(this, { send, waiting: new Map(), storage: null });
  }

  // Each operation has an entry of its own in the storage, so that two tabs never overwrite each other's.
  open(place) {
    this.storage = `deerml-review:${place}:`;
    const found = [];
    attempt(() => {
      for (let n = 0; n < localStorage.length; n += 1) {
        const key = localStorage.key(n);
        if (key.startsWith(this.storage)) found.push(JSON.parse(localStorage.getItem(key)));
      }
    });
    const strange = found.filter(({ message }) => message?.op_id && !this.waiting.has(message.op_id));
    strange.sort((one, other) => one.at - other.at);
    // What an earlier page left comes before what this one has made.
    const own = [...this.waiting];
    this.waiting = new Map([...strange.map(({ message }) => [message.op_id, { message, sent: 0 }]), ...own]);
    for (const [, entry] of own) this.store(entry.message);
    return strange.length;
  }

  store(message) {
    if (!this.storage) return;
    const entry = JSON.stringify({ at: Date.now(), message });
    attempt(() => localStorage.setItem(this.storage + message.op_id, entry));
  }

  add(message) {
    this.waiting.set(message.op_id, { message, sent: 0 });
    this.store(message);
    this.pump();
  }

  // In order, and one at a time for an item: the next names the revision that the one before has made.
  pump() {
    const busy = new Set();
    for (const entry of this.waiting.values()) {
      const item = entry.message.item_id;
      if (!entry.sent && !busy.has(item)) {
        entry.sent = performance.now();
        this.send(entry.message);
      }
      busy.add(item);
    }
  }

  resend(olderThan = 0) {
    const now = performance.now();
    for (const entry of this.waiting.values()) if (entry.sent && now - entry.sent >= olderThan) entry.sent = 0;
    this.pump();
  }

  settle(id) {
    const entry = this.waiting.get(id);
    this.waiting.delete(id);
    if (this.storage) attempt(() => localStorage.removeItem(this.storage + id));
    this.pump();
    return entry?.message;
  }

  all() {
    return [...this.waiting.values()].map((entry) => entry.message);
  }

  markSent() {
    for (const entry of this.waiting.values()) entry.sent = performance.now();
  }
}

// The storage may be full or forbidden (private windows, sandboxed frames): then only a crash of the page loses what
// was not acknowledged, so its absence changes nothing else.
function attempt(action) {
  try {
    return action();
  } catch {
    return null;
  }
}

// -- stage: one frame, its boxes, and everything that happens with the pointer ------------------------------------

const HANDLES = ["nw", "n", "ne", "e", "se", "s", "sw", "w"];

class Stage {
  constructor(review) {
    this.review = review;
    this.overlay = svg("svg", { class: "overlay", preserveAspectRatio: "none", "aria-hidden": "true" });
    this.picture = h("div", { class: "picture" });
    this.tags = h("div", { class: "tags", "aria-hidden": "true" });
    this.sheet = h("div", { class: "sheet" }, this.picture, this.overlay, this.tags);
    this.card = h("div", { class: "card", hidden: true });
    this.view = h("div", { class: "view", role: "img" }, this.sheet, this.card);
    this.pointers = new Map();
    this.size = [1, 1];
    this.zoom = 1;
    this.center = [0.5, 0.5];
    this.observer = new ResizeObserver(() => this.measure());
    this.observer.observe(this.view);
    this.view.addEventListener("pointerdown", (event) => this.down(event));
    this.view.addEventListener("pointermove", (event) => this.move(event));
    this.view.addEventListener("pointerup", (event) => this.up(event));
    this.view.addEventListener("pointercancel", (event) => this.cancel(event));
    this.view.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
  }

  measure() {
    this.size = [this.view.clientWidth || 1, this.view.clientHeight || 1];
    if (this.frame) this.place();
  }

  show(frame, held) {
    if (this.frame !== frame) this.cancel();
    this.frame = frame;
    if (held?.image && this.picture.firstChild !== held.image) this.picture.replaceChildren(held.image);
    if (!held?.image) this.picture.replaceChildren(...(held?.thumb ? [copied(held.thumb)] : []));
    const message = PROBLEMS[frame.problem] ?? (held ? null : "Loading…");
    this.card.hidden = !message;
    this.card.replaceChildren(...(frame.problem ? [icon("alert"), message, h("small", {}, "Skip it with S.")] : [message ?? ""]));
    this.overlay.setAttribute("viewBox", `0 0 ${frame.width} ${frame.height}`);
    this.place();
    this.draw();
  }

  // -- zoom: the sheet is laid out at its real size, so that lines stay sharp and the mapping to pixels stays exact

  get scale() {
    return this.fitting * this.zoom;
  }

  get fitting() {
    return Math.min(this.size[0] / this.frame.width, this.size[1] / this.frame.height);
  }

  place() {
    const lengths = [this.frame.width * this.scale, this.frame.height * this.scale];
    const starts = lengths.map((length, axis) => {
      const room = this.size[axis];
      if (length <= room) return (room - length) / 2;
      return clamp(room / 2 - this.center[axis] * length, room - length, 0);
    });
    this.starts = starts;
    this.center = starts.map((start, axis) => (this.size[axis] / 2 - start) / lengths[axis]);
    Object.assign(this.sheet.style, {
      left: `${starts[0]}px`,
      top: `${starts[1]}px`,
      width: `${lengths[0]}px`,
      height: `${lengths[1]}px`,
    });
    this.view.classList.toggle("zoomed", this.zoom > 1);
    this.sheet.classList.toggle("pixels", this.scale * devicePixelRatio > 3);
    this.askForPixels();
  }

  zoomTo(zoom, event = null) {
    if (!this.frame || this.frame.problem) return;
    const view = this.view.getBoundingClientRect();
    const at = event ? [event.clientX - view.left, event.clientY - view.top] : this.size.map((length) => length / 2);
    const before = this.starts;
    const old = this.scale;
    this.zoom = clamp(zoom, 1, MOST_ZOOM);
    const lengths = [this.frame.width * this.scale, this.frame.height * this.scale];
    // The point under the pointer stays where it is.
    this.center = at.map((place, axis) => {
      const pixel = (place - before[axis]) / old;
      return (this.size[axis] / 2 - place + pixel * this.scale) / lengths[axis];
    });
    this.place();
  }

  reset() {
    Object.assign(this, { zoom: 1, center: [0.5, 0.5] });
    if (this.frame) this.place();
  }

  askForPixels() {
    const held = this.review.pictures.get(frameKey(this.frame.id));
    if (this.zoom === 1 || !held?.image || held.full) return;
    const shown = held.image.naturalWidth;
    const wanted = this.frame.width * this.scale * devicePixelRatio;
    if (shown < this.frame.width && wanted > shown) this.review.askForImage(this.frame, true);
  }

  wheel(event) {
    if (!event.ctrlKey) return;
    event.preventDefault();
    this.zoomTo(this.zoom * Math.exp(-event.deltaY / 300), event);
  }

  // -- boxes

  draw() {
    const { review, frame } = this;
    const shown = review.boxesHidden || frame.problem ? [] : frame.boxes;
    this.overlay.replaceChildren(...shown.map((box) => this.lines(box)));
    this.tags.replaceChildren(...shown.flatMap((box) => this.labels(box)));
    this.view.classList.toggle("drawing", review.drawing);
    this.view.setAttribute("aria-label", review.describe(frame));
  }

  classes(box) {
    const selected = box === this.review.selected ? "selected" : "";
    return `${box.kind} ${box.word ?? "unjudged"} ${selected}`;
  }

  lines(box) {
    const [x, y, width, height] = box.box;
    const rect = (name) => svg("rect", { class: name, x, y, width, height, "vector-effect": "non-scaling-stroke" });
    const group = svg("g", { class: `box ${this.classes(box)}` }, rect("halo"), rect("line"));
    if (!SURVIVES(box)) {
      const d = `M${x} ${y}l${width} ${height}M${x + width} ${y}l${-width} ${height}`;
      group.append(svg("path", { class: "line", d, "vector-effect": "non-scaling-stroke" }));
    }
    return group;
  }

  // Text and handles are not part of the drawing, because they keep their size at every zoom.
  labels(box) {
    const { frame, review } = this;
    const percent = (value, whole) => `${(100 * value) / whole}%`;
    const [x, y, width, height] = box.box;
    const place = h("div", { class: `place ${this.classes(box)}` });
    Object.assign(place.style, {
      left: percent(x, frame.width),
      top: percent(y, frame.height),
      width: percent(width, frame.width),
      height: percent(height, frame.height),
    });
    const name = review.nameOf(box);
    const tag = h("span", { class: "tag" });
    if (box.word) tag.append(icon(box.word === "false_positive" ? "cross" : "check"));
    tag.append(name);
    tag.classList.toggle("inside", y * this.scale < 26);
    const room = this.size[0] - this.starts[0] - x * this.scale;
    tag.classList.toggle("leftward", room < 30 + 7 * name.length);
    place.append(tag);
    if (box === review.selected) place.append(...HANDLES.map((name) => h("i", { class: name, "data-handle": name })));
    return [place];
  }

  at(point) {
    const inside = ({ box: [x, y, width, height] }) =>
      point[0] >= x && point[0] <= x + width && point[1] >= y && point[1] <= y + height;
    const area = ({ box }) => box[2] * box[3];
    if (this.review.boxesHidden) return null;
    return this.frame.boxes.filter(inside).sort((one, other) => area(one) - area(other))[0] ?? null;
  }

  // -- pointer: mouse, pen and finger alike

  // The sheet's own rectangle knows about letterbox, zoom, scrolling and the zoom of the page.
  pixel(event) {
    const sheet = this.sheet.getBoundingClientRect();
    const { width, height } = this.frame;
    const x = ((event.clientX - sheet.left) / sheet.width) * width;
    const y = ((event.clientY - sheet.top) / sheet.height) * height;
    return [clamp(x, 0, width), clamp(y, 0, height)];
  }

  down(event) {
    if (!this.frame || this.frame.problem || event.button > 0) return;
    attempt(() => this.view.setPointerCapture(event.pointerId)); // a pointer that is gone already cannot be captured
    this.pointers.set(event.pointerId, event);
    if (this.pointers.size === 2) return this.startPinch();
    const { selected, drawing } = this.review;
    const point = this.pixel(event);
    const base = { event, point, from: this.starts, moved: false };
    const handle = event.target.dataset?.handle;
    if (selected && (handle || this.at(point) === selected)) {
      this.gesture = { ...base, kind: "box", box: selected, handle, old: [...selected.box] };
    } else {
      this.gesture = { ...base, kind: drawing ? "draw" : "pan" };
    }
    if (this.gesture.kind !== "pan" || this.zoom > 1) event.preventDefault();
  }

  move(event) {
    if (this.pointers.has(event.pointerId)) this.pointers.set(event.pointerId, event);
    if (this.pinch) return this.movePinch();
    const { gesture } = this;
    if (!gesture || gesture.event.pointerId !== event.pointerId) return;
    const way = [event.clientX - gesture.event.clientX, event.clientY - gesture.event.clientY];
    if (!gesture.moved && Math.hypot(...way) < SMALLEST_BOX) return;
    gesture.moved = true;
    if (gesture.kind === "pan") this.pan(gesture, way);
    else if (gesture.kind === "draw") this.stretch(gesture, this.pixel(event));
    else this.change(gesture, this.pixel(event));
  }

  pan(gesture, way) {
    const lengths = [this.frame.width * this.scale, this.frame.height * this.scale];
    this.center = lengths.map((length, axis) => (this.size[axis] / 2 - gesture.from[axis] - way[axis]) / length);
    this.place();
  }

  stretch(gesture, point) {
    const starts = point.map((value, axis) => Math.min(value, gesture.point[axis]));
    const lengths = point.map((value, axis) => Math.abs(value - gesture.point[axis]));
    gesture.box ??= this.review.newBox();
    gesture.box.box = [...starts, ...lengths];
    if (!this.frame.boxes.includes(gesture.box)) this.frame.boxes.push(gesture.box);
    this.draw();
  }

  change(gesture, point) {
    const way = point.map((value, axis) => value - gesture.point[axis]);
    gesture.box.box = gesture.handle
      ? resized(gesture.old, gesture.handle, way, this.frame)
      : shifted(gesture.old, way, this.frame);
    this.draw();
  }

  up(event) {
    this.pointers.delete(event.pointerId);
    if (this.pinch) {
      if (this.pointers.size === 0) this.pinch = null;
      return;
    }
    const { gesture } = this;
    if (!gesture || gesture.event.pointerId !== event.pointerId) return;
    if (gesture.moved) this.move(event); // where it was lifted, not where it was last seen
    this.gesture = null;
    if (!gesture.moved) return this.review.select(this.at(gesture.point));
    if (gesture.kind === "draw") this.finishDrawing(gesture.box);
    if (gesture.kind === "box") this.review.changed(gesture.box, gesture.old);
  }

  finishDrawing(box) {
    const { boxes } = this.frame;
    boxes.splice(boxes.indexOf(box), 1);
    const small = Math.min(box.box[2], box.box[3]) * this.scale < SMALLEST_BOX;
    if (small) this.review.refuse("Too small for a box: draw around the animal");
    else this.review.add(box);
    this.draw();
  }

  cancel() {
    const { gesture } = this;
    Object.assign(this, { gesture: null, pinch: null });
    this.pointers.clear();
    if (!gesture?.box || !gesture.moved) return;
    if (gesture.kind === "box") gesture.box.box = gesture.old;
    const place = this.frame.boxes.indexOf(gesture.box);
    if (gesture.kind === "draw" && place >= 0) this.frame.boxes.splice(place, 1);
    this.draw();
  }

  startPinch() {
    const fingers = new Map(this.pointers);
    this.cancel();
    this.pointers = fingers;
    this.pinch = { zoom: this.zoom, span: this.span() };
  }

  span() {
    const [one, other] = [...this.pointers.values()];
    return Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY);
  }

  movePinch() {
    if (this.pointers.size < 2) return;
    const [one, other] = [...this.pointers.values()];
    const middle = { clientX: (one.clientX + other.clientX) / 2, clientY: (one.clientY + other.clientY) / 2 };
    this.zoomTo((this.pinch.zoom * this.span()) / this.pinch.span, middle);
  }
}

function copied(canvas) {
  const copy = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
  copy.getContext("2d").drawImage(canvas, 0, 0);
  return copy;
}

function shifted([x, y, width, height], way, frame) {
  return [clamp(x + way[0], 0, frame.width - width), clamp(y + way[1], 0, frame.height - height), width, height];
}

function resized([x, y, width, height], handle, way, frame) {
  let [left, top, right, bottom] = [x, y, x + width, y + height];
  if (handle.includes("w")) left = clamp(left + way[0], 0, right - 1);
  if (handle.includes("e")) right = clamp(right + way[0], left + 1, frame.width);
  if (handle.includes("n")) top = clamp(top + way[1], 0, bottom - 1);
  if (handle.includes("s")) bottom = clamp(bottom + way[1], top + 1, frame.height);
  return [left, top, right - left, bottom - top];
}

// -- page of crops ------------------------------------------------------------------------------------------------

class CropPage {
  constructor(review) {
    this.review = review;
    this.view = h("div", { class: "crops", role: "group", "aria-label": "Crops: mark the exceptions" });
    this.observer = new ResizeObserver(() => this.arrange());
    this.observer.observe(this.view);
    this.view.addEventListener("click", (event) => {
      const tile = event.target.closest(".crop");
      if (!tile) return;
      review.root.focus({ preventScroll: true }); // the tile is about to be made anew
      this.at = [...this.view.children].indexOf(tile);
      this.toggle();
    });
  }

  show(item) {
    if (this.item !== item) this.at = 0;
    this.item = item;
    for (const crop of item.crops) crop.word ??= "correct";
    this.view.replaceChildren(...item.crops.map((crop, index) => this.tile(crop, index)));
    this.arrange();
  }

  tile(crop, index) {
    const held = this.review.pictures.get(cropKey(crop.box_key));
    const [mark, word] = {
      correct: ["check", "right"],
      false_positive: ["cross", "wrong"],
      unsure: ["skip", "left out"],
    }[crop.word];
    const body = crop.problem ? h("span", { class: "gone" }, icon("alert"), "No image") : (held?.image ?? "");
    const score = this.review.scoresHidden ? "" : crop.score.toFixed(2);
    return h(
      "button",
      {
        type: "button",
        class: `crop ${crop.word} ${index === this.at ? "current" : ""}`,
        tabindex: "-1",
        "aria-pressed": String(crop.word !== "correct"),
      },
      h("span", { class: "number" }, String(index + 1)),
      body,
      h("span", { class: "state" }, icon(mark), word),
      h("span", { class: "score" }, score),
    );
  }

  // As few columns as let every crop be seen at once: what is confirmed must have been on the screen.
  arrange() {
    const count = this.item?.crops.length ?? 0;
    const { clientWidth: width, clientHeight: height } = this.view;
    let best = { columns: 1, side: 0 };
    for (let columns = 1; columns <= count; columns += 1) {
      const side = Math.min(width / columns, height / Math.ceil(count / columns));
      if (side > best.side) best = { columns, side };
    }
    this.columns = best.columns;
    this.view.style.gridTemplateColumns = `repeat(${best.columns}, minmax(0, 1fr))`;
  }

  toggle(index = this.at, word = null) {
    const crop = this.item.crops[index];
    if (!crop) return;
    this.at = index;
    crop.word = word && crop.word !== word ? word : crop.word === "correct" ? "false_positive" : "correct";
    this.show(this.item);
    this.review.announce(`${index + 1} ${WORDS[crop.word] ?? "left out"}`);
    this.review.renderBar();
  }

  all(word) {
    for (const crop of this.item.crops) crop.word = word;
    this.show(this.item);
    this.review.announce(word === "correct" ? "All right: mark the exceptions" : "All wrong: mark the exceptions");
    this.review.renderBar();
  }

  step(key) {
    const way = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns }[key];
    this.at = clamp(this.at + way, 0, this.item.crops.length - 1);
    this.show(this.item);
    const { label, word } = this.item.crops[this.at];
    this.review.announce(`${this.at + 1}: ${label}, ${WORDS[word] ?? "left out"}`);
  }
}

// -- the review ---------------------------------------------------------------------------------------------------

class Review {
  constructor(model, el) {
    Object.assign(this, { model, el, client: uuid(), online: true, readOnly: false });
    Object.assign(this, { items: [], item: null, index: 0, past: [], generation: null, lastKnown: null });
    Object.assign(this, { revisions: new Map(), frameIds: new Map() }); // keys of pictures are text, ids may be numbers
    Object.assign(this, { mode: null, choice: null, classes: [], cameras: [], label: "", words: "", progress: null });
    Object.assign(this, { selected: null, drawing: false, question: null, ended: null, boxesHidden: false, pressedAt: null });
    this.scoresHidden = attempt(() => localStorage.getItem("deerml-review-scores")) === "hidden";
    this.pictures = new Pictures((key) => this.pictureReady(key), (key, reason) => this.pictureBroken(key, reason));
    this.outbox = new Outbox((message) => this.send(this.renewed(message)));
    this.actions = {
      correct: (press) => this.judge("C", press),
      wrong: (press) => this.judge("F", press),
      nothing: (press) => this.judge("N", press),
      boxed: (press) => this.judge("B", press),
      skip: (press) => this.skip(press),
      missed: () => this.setDrawing(!this.drawing),
      undo: (press) => this.undo(press),
      zoomIn: () => this.stage.zoomTo(this.stage.zoom * 1.5),
      zoomOut: () => this.stage.zoomTo(this.stage.zoom / 1.5),
      fit: () => this.stage.reset(),
      boxes: () => this.hideBoxes(!this.boxesHidden),
      scores: () => this.hideScores(!this.scoresHidden),
      play: () => this.play(!this.playing),
      grid: () => this.choose(this.mode === "grid" ? "strip" : "grid"),
      help: () => this.toggleHelp(),
      yes: (press) => this.answer(true, press),
      no: (press) => this.answer(false, press),
      close: () => this.escape(),
      confirm: (press) => this.confirmPage(press),
      allRight: () => this.crops.all("correct"),
      allWrong: () => this.crops.all("false_positive"),
      place: () => this.placeBox(),
      boxRight: () => this.judgeBox("correct", "Shift+C"),
      boxWrong: () => this.judgeBox("false_positive", "Shift+F"),
      remove: () => this.removeBox(),
      scope: () => this.setScope(!this.onlyThis),
      again: () => this.start(),
    };
    this.build();
    this.listen();
    this.start();
  }

  // -- the page's parts

  build() {
    this.stage = new Stage(this);
    this.crops = new CropPage(this);
    this.title = h("h2");
    this.subtitle = h("p", { class: "words" });
    this.figures = h("p", { class: "figures" });
    this.saving = h("span", { class: "saving", hidden: true });
    this.filled = h("div");
    this.meter = h("div", { class: "meter", role: "progressbar", "aria-label": "Progress", "aria-valuemin": "0" }, this.filled);
    this.chooser = h("div", { class: "chooser" });
    this.banner = h("div", { class: "banner", hidden: true });
    this.caption = h("div", { class: "caption", "aria-hidden": "true" });
    this.tools = h("div", { class: "tools" }, ...TOOLS.map((name) => this.button(name, "tool")));
    this.context = h("div", { class: "context", hidden: true });
    this.toast = h("div", { class: "toast", "aria-hidden": "true" });
    this.ending = h("div", { class: "ending", hidden: true });
    this.main = h("div", { class: "main" }, this.stage.view, this.crops.view, this.ending, this.tools, this.caption, this.context, this.toast);
    this.strip = h("div", { class: "strip", role: "group", "aria-label": "Frames of this window" });
    this.row = h("div", { class: "row" }, this.strip);
    this.bar = h("div", { class: "bar", role: "toolbar", "aria-label": "Verdicts" });
    this.live = h("div", { class: "live", "aria-live": "polite", role: "status" });
    this.helpCard = h("div", { class: "help", hidden: true });
    const texts = h("div", { class: "texts" }, this.title, this.subtitle);
    const header = h("header", {}, texts, h("div", { class: "side" }, this.chooser, h("div", { class: "numbers" }, this.saving, this.figures)));
    this.root = h("section", {
      class: `deerml-review ${this.onPage() ? "on-page" : "in-notebook"}`,
      role: "application",
      tabindex: "0",
      "aria-label": "Review of camera frames. Press ? for the keys.",
      "data-lm-suppress-shortcuts": "true", // or JupyterLab takes A and B for new cells
    });
    this.root.append(header, this.meter, this.banner, this.main, this.row, this.bar, this.live, this.helpCard);
    this.el.append(this.root);
    this.renderAll();
  }

  onPage() {
    return this.el.dataset.host === "page" || /\/review\/?$/.test(location.pathname);
  }

  button(name, kind = "key", change = {}) {
    const action = { ...ACTIONS[name], ...change };
    return h(
      "button",
      { type: "button", class: `${kind} do-${name}`, "data-action": name, "aria-keyshortcuts": action.key, title: action.help ?? action.label },
      icon(action.icon),
      h("span", { class: "label" }, action.label),
      action.key ? h("kbd", { "aria-hidden": "true" }, action.key) : null,
    );
  }

  listen() {
    this.onMessage = (message, buffers) => this.receive(message, buffers ?? []);
    this.model.on("msg:custom", this.onMessage);
    this.root.addEventListener("keydown", (event) => this.keydown(event));
    this.root.addEventListener("click", (event) => this.click(event));
    this.root.addEventListener("change", (event) => this.change(event));
    // A press on anything but a control gives the keys back to the review.
    this.root.addEventListener("pointerdown", (event) => {
      if (!event.target.closest("button, select, input")) this.root.focus({ preventScroll: true });
    });
    this.schemes = matchMedia("(prefers-color-scheme: dark)");
    this.onTheme = () => this.applyTheme();
    this.schemes.addEventListener("change", this.onTheme);
    this.themes = new MutationObserver(this.onTheme);
    for (const node of [document.documentElement, document.body])
      this.themes.observe(node, { attributes: true, attributeFilter: ["class", "style", "theme", "data-theme", "data-jp-theme-light", "data-vscode-theme-kind"] });
    this.timer = setInterval(() => this.tick(), 1000);
    this.applyTheme();
    if (this.onPage() || !isTyping(document.activeElement)) this.root.focus({ preventScroll: true });
  }

  close() {
    this.flush();
    clearInterval(this.timer);
    clearTimeout(this.staying);
    clearInterval(this.playing);
    this.model.off("msg:custom", this.onMessage);
    this.schemes.removeEventListener("change", this.onTheme);
    this.themes.disconnect();
    this.stage.observer.disconnect();
    this.crops.observer.disconnect();
    this.pictures.keepOnly([]);
    this.root.remove();
  }

  // The host's own background decides; where it has none, the wish of the person's system.
  applyTheme() {
    const probe = h("i", { class: "probe" });
    this.root.append(probe);
    const [red, green, blue, alpha = 1] = getComputedStyle(probe).backgroundColor.match(/[\d.]+/g)?.map(Number) ?? [0, 0, 0, 0];
    probe.remove();
    const named = document.documentElement.getAttribute("theme") ?? document.documentElement.dataset.theme;
    const dark = alpha > 0 ? red + green + blue < 384 : named ? named === "dark" : this.schemes.matches;
    this.root.dataset.theme = dark ? "dark" : "light";
  }

  // -- messages

  send(message) {
    // A dead connection is no reason to stop: what matters stays in the outbox and is sent again.
    try {
      this.model.send(message);
    } catch {
      this.online = false;
      this.renderSaving();
    }
  }

  start() {
    const have = [...this.pictures.held].filter(([key, held]) => held.image && key.startsWith("frame:"));
    const pending = this.outbox.all().map((message) => this.renewed(message));
    this.outbox.markSent();
    this.asking = performance.now();
    const ids = have.map(([key]) => this.frameIds.get(key));
    this.send({ type: "ready", client: this.client, mode: this.mode, choice: this.choice, have: ids, pending });
  }

  // The latest known revision, because an operation before this one may have made it meanwhile
  renewed(message) {
    if (message.type !== "verdict") return message;
    for (const frame of message.frames) frame.revision = this.revisions.get(frame.frame_id) ?? frame.revision;
    return message;
  }

  receive(message, buffers) {
    const handlers = {
      hello: () => this.hello(message),
      items: () => this.addItems(message),
      image: () => this.addImage(message, buffers[0]),
      ack: () => this.acknowledged(message),
      reject: () => this.rejected(message),
      progress: () => this.renderProgress(message),
      end: () => this.end(message),
      error: () => this.trouble(message),
      connection: () => this.connection(message.state),
    };
    handlers[message.type]?.();
  }

  hello(message) {
    const { classes, cameras, reviewer, mode, choice, words } = message;
    Object.assign(this, { classes, cameras: cameras ?? [], reviewer, mode, choice, words, readOnly: message.read_only, online: true });
    if (!classes.includes(this.label)) this.label = classes[0] ?? "";
    if (message.generation !== this.generation) this.forget(message.generation);
    const place = [location.pathname, message.store ?? "", reviewer].join("|");
    this.renderHeader();
    this.renderProgress(message.progress);
    if (this.readOnly) this.say("This home is read-only: you can look, but no verdict can be stored", { keep: true });
    // What an earlier page could not deliver goes first, so that the items come as they are after it.
    if (this.outbox.open(place)) this.start();
  }

  forget(generation) {
    this.leave();
    Object.assign(this, { generation, items: [], item: null, lastKnown: null, ended: null, asking: 0, shown: null });
    this.renderAll();
  }

  addItems({ generation, items }) {
    const newer = this.generation === null ? generation !== this.dropped : generation > this.generation;
    if (newer) this.forget(generation);
    if (generation !== this.generation) return;
    this.asking = 0;
    if (items.length) Object.assign(this, { ended: null, lastKnown: items.at(-1).id });
    for (const item of items) {
      const known = this.items.find((other) => other.id === item.id);
      if (!known) this.items.push(item);
      this.learn(item);
      for (const part of parts(item)) this.pictures.mayAsk(keyOf(part)); // they are on their way
    }
    // An empty answer is followed by the end: asking at once would go on for ever.
    if (items.length && !this.item) this.advance(this.pressedAt);
    if (items.length) this.ask();
  }

  learn(item) {
    for (const part of item.frames ?? item.crops) {
      this.revisions.set(part.frame_id ?? part.id, part.revision);
      if (item.kind === "strip") this.frameIds.set(frameKey(part.id), part.id);
    }
  }

  addImage(message, buffer) {
    const key = message.crop === undefined || message.crop === null ? frameKey(message.frame_id) : cropKey(message.crop);
    const whole = message.full || this.items.some((item) => keyOf(parts(item)[item.key_frame ?? 0]) === key);
    this.pictures.add(key, message, buffer, whole);
  }

  // Another view of the same widget hears the answers to this one's operations as well: it learns from them.
  acknowledged(message) {
    const own = this.outbox.settle(message.op_id);
    const busy = new Set(this.outbox.all().map((waiting) => waiting.item_id));
    for (const [id, state] of Object.entries(message.frames ?? {})) {
      for (const item of this.items) {
        const part = item.frames?.find((frame) => String(frame.id) === id);
        const crop = item.crops?.find((other) => String(other.frame_id) === id);
        if (part ?? crop) this.revisions.set(part?.id ?? crop.frame_id, state.revision);
        if (part && !busy.has(item.id)) Object.assign(part, { state: state.state, statement: state.statement });
        if (part && !own && item.frames.every((frame) => frame.statement)) item.done = true;
      }
    }
    if (message.progress?.total) this.renderProgress(message.progress); // a desk that has just begun has no total yet
    else this.renderSaving();
    if (message.note) this.say(message.note);
    if (this.item?.done && !own) this.advance();
    else if (this.item?.kind === "strip") this.renderStrip();
    if (this.ended && !this.item && !this.outbox.waiting.size) this.ask(true);
  }

  rejected(message) {
    const entry = this.outbox.waiting.get(message.op_id);
    if (!entry) return;
    if (message.retry || message.code === "BUSY") return this.later(entry);
    const { frames } = entry.message;
    const known = frames?.some((frame) => this.revisions.get(frame.frame_id) !== frame.revision);
    // An earlier operation of this page has made a newer revision meanwhile: not a conflict.
    if (message.code === "STALE" && known) {
      entry.sent = 0;
      return this.outbox.pump();
    }
    this.outbox.settle(message.op_id);
    if (entry.message.type === "undo" && message.code === "NO_EVENT") return this.renderSaving();
    this.bringBack(message, entry.message);
  }

  later(entry) {
    this.busy = true;
    this.renderSaving();
    setTimeout(() => {
      entry.sent = 0;
      this.outbox.pump();
    }, clamp((entry.tries = (entry.tries ?? 0) + 1) * 500, 500, RESEND_MS));
  }

  // A picture is never swapped under the eyes of somebody who is about to judge it: the refused one comes next.
  bringBack(message, operation) {
    const place = this.past.findIndex((step) => step.op_id === operation.op_id);
    const [step] = place >= 0 ? this.past.splice(place, 1) : [];
    const item = this.items.find((other) => other.id === operation.item_id) ?? step?.item ?? message.item;
    if (!item) return this.say(`Not stored: ${message.message}`, { keep: true });
    if (message.item) Object.assign(item, message.item);
    else if (step) restore(item, step.before);
    this.learn(item);
    Object.assign(item, { done: false, message: `Not stored: ${message.message}` });
    if (item === this.item) return this.show(item);
    this.items = this.items.filter((other) => other !== item);
    this.items.splice(this.item ? this.items.indexOf(this.item) + 1 : this.items.length, 0, item);
    this.say(`A verdict was not stored: ${message.message}${this.item ? " Its frames come back next." : ""}`);
    if (!this.item) this.show(item);
    this.renderSaving();
  }

  end(message) {
    this.asking = 0;
    this.ended = message;
    if (!this.item) this.renderAll();
  }

  // About one picture: its card says so. About anything else: a person should read it.
  trouble({ message, frame_id: id, crop, full, retry }) {
    const key = crop ? cropKey(crop) : frameKey(id);
    const part = this.items.flatMap(parts).find((other) => keyOf(other) === key);
    if (part && !full) part.problem = "broken";
    if (part && !full) this.pictureReady(key);
    else this.say(message, { keep: !retry });
  }

  connection(state) {
    this.online = state === "open";
    this.renderSaving();
    if (this.online) this.start();
  }

  tick() {
    const now = performance.now();
    if (this.asking && now - this.asking > RESEND_MS) this.asking = 0;
    if (this.online) this.outbox.resend(RESEND_MS);
    if (this.online && this.generation === null && !this.asking) this.start(); // nobody has answered
    this.askForMissing();
    this.ask();
    this.renderSaving();
  }

  // More items, while fewer than three, or fewer than eight frames, are ready ahead
  ask(force = false) {
    if (this.generation === null || this.asking || (this.ended && !force)) return;
    const ahead = this.items.filter((item) => !item.done && item !== this.item);
    const frames = ahead.reduce((sum, item) => sum + (item.frames?.length ?? FRAMES_AHEAD), 0);
    if (!force && ahead.length >= ITEMS_AHEAD && frames >= FRAMES_AHEAD) return;
    this.asking = performance.now();
    this.send({ type: "need", after: this.lastKnown, items: ITEMS_AHEAD, generation: this.generation });
  }

  askForImage(part, full = false) {
    const key = part.box_key ? cropKey(part.box_key) : frameKey(part.id);
    if (!this.pictures.mayAsk(full ? `${key}:full` : key)) return;
    this.send(part.box_key ? { type: "image", crop: part.box_key, full } : { type: "image", frame_id: part.id, full });
  }

  askForMissing() {
    if (!this.item) return;
    for (const part of parts(this.item)) if (!part.problem && !this.pictures.get(keyOf(part))?.image) this.askForImage(part);
  }

  pictureReady(key) {
    if (this.item && parts(this.item).some((part) => keyOf(part) === key)) {
      if (this.item.kind === "grid") this.crops.show(this.item);
      else {
        if (keyOf(this.frame) === key) this.showStage();
        this.renderStrip();
      }
      this.watch();
    }
    this.trim();
  }

  pictureBroken(key, reason) {
    for (const item of this.items) {
      for (const part of parts(item)) {
        if (keyOf(part) !== key) continue;
        part.problem = "broken";
        this.send({ type: "broken", frame_id: part.frame_id ?? part.id, reason });
      }
    }
    this.pictureReady(key);
  }

  // Dearest first: what is on the screen, the picture that undo shows at once, what comes, then what was.
  trim() {
    const behind = this.items.filter((item) => item.done && item !== this.item).slice(-ITEMS_BEHIND).reverse();
    const ahead = this.items.filter((item) => !item.done && item !== this.item);
    const main = (item) => keyOf(parts(item)[item.key_frame ?? 0]);
    const order = [this.item, ...ahead.slice(0, 1)].filter(Boolean).flatMap((item) => parts(item).map(keyOf));
    order.push(...behind.map(main), ...[...ahead.slice(1), ...behind].flatMap((item) => parts(item).map(keyOf)));
    this.pictures.keepOnly([...new Set(order)]);
  }

  // -- which item is on the screen

  get frame() {
    return this.item?.frames?.[this.index] ?? null;
  }

  advance(time = null) {
    this.flush();
    const open = (item) => !item.done;
    const next = this.items.slice(this.items.indexOf(this.item) + 1).find(open) ?? this.items.find(open);
    if (next) return this.show(next, time);
    this.leave();
    this.item = null;
    this.pressedAt = time; // the picture that this press waits for is still on its way
    this.renderAll();
    this.ask(Boolean(this.ended)); // the closing sentence is to know of the last verdict as well
  }

  show(item, time = null) {
    this.leave();
    this.item = item;
    this.pressedAt = null;
    this.index = clamp(item.key_frame ?? 0, 0, (item.frames?.length ?? 1) - 1);
    this.shown = { item, keyTime: time, at: performance.now(), large: new Map(), small: new Map(), told: false };
    this.stage.reset();
    this.renderAll();
    this.watch();
    this.askForMissing();
    this.ask();
    this.trim();
    clearTimeout(this.staying);
    this.staying = setTimeout(() => this.decodeStrip(), STAYS_MS);
  }

  // What belongs to one item ends with it.
  leave() {
    clearInterval(this.playing);
    Object.assign(this, { selected: null, drawing: false, question: null, playing: null, boxesHidden: false });
  }

  go(index) {
    if (!this.item?.frames || index === this.index) return;
    this.flush();
    this.index = clamp(index, 0, this.item.frames.length - 1);
    this.selected = null;
    this.showStage();
    this.renderStrip();
    this.renderContext();
    this.watch();
    this.askForMissing();
    this.announce(this.describe(this.frame));
  }

  play(on) {
    clearInterval(this.playing);
    this.playing = null;
    if (on && this.item?.frames?.length > 1) {
      this.playing = setInterval(() => this.go((this.index + 1) % this.item.frames.length), FLIP_MS);
    }
    this.tools.querySelector(".do-play").setAttribute("aria-pressed", String(Boolean(this.playing)));
  }

  // -- seen before judged

  watch() {
    const { shown, item } = this;
    if (!shown || !item) return;
    const mounted = parts(item).filter((part) => part.problem || this.pictures.get(keyOf(part)));
    const large = this.frame && (this.frame.problem || this.pictures.get(keyOf(this.frame))?.image) ? this.frame : null;
    const whole = mounted.length === parts(item).length && (item.kind === "grid" || large);
    const painted = (time) => {
      if (!whole || shown.told || this.shown !== shown) return;
      shown.told = true;
      const detail = { item_id: item.id, key_time: shown.keyTime, painted_time: time };
      this.root.dispatchEvent(new CustomEvent("deerml:painted", { detail, bubbles: true }));
    };
    const certain = (time) => {
      for (const part of mounted) if (!shown.small.has(keyOf(part))) shown.small.set(keyOf(part), time);
      if (large && !shown.large.has(keyOf(large))) shown.large.set(keyOf(large), time);
    };
    afterPaint(painted, certain);
  }

  // For whoever stays on a strip: its other frames, decoded one after the other, so that a step shows at once
  async decodeStrip({ item } = this.shown ?? {}) {
    for (const frame of item?.frames ?? []) {
      if (this.item !== item) return;
      await this.pictures.get(frameKey(frame.id))?.image?.decode().catch(() => null); // dropped meanwhile
    }
  }

  notYet(wanted) {
    const { shown, frame } = this;
    const since = (map, part) => performance.now() - (map.get(keyOf(part)) ?? Infinity);
    const times = wanted.length > 1 || !frame ? wanted.map((part) => since(shown.small, part)) : [];
    if (frame) times.push(since(shown.large, frame));
    const least = Math.min(...times);
    if (least >= DWELL_MS) return null;
    return least === -Infinity ? "Not yet: the image is still loading" : "Not yet: the image has just appeared";
  }

  // -- verdicts

  scope(alone) {
    return this.mode === "single" || this.onlyThis || alone ? [this.frame] : this.item.frames;
  }

  objection(key, frames) {
    if (this.readOnly) return "This home is read-only: no verdict can be stored";
    const late = this.notYet(frames);
    if (late || key === "S") return late;
    if (this.boxesHidden) {
      this.hideBoxes(false);
      return "The boxes were hidden: look at them first";
    }
    if (frames.every((frame) => frame.problem)) return "This image cannot be shown: press S to skip it";
    if (!"CB".includes(key) || frames.some((frame) => !frame.problem && frame.boxes.some(SURVIVES))) return null;
    return "There is no box to confirm: press N when nothing is here, M to draw";
  }

  judge(key, press) {
    if (this.item?.kind !== "strip") return;
    if (this.selected && press.shift && "CF".includes(key)) {
      return this.judgeBox(key === "C" ? "correct" : "false_positive", `Shift+${key}`);
    }
    this.flush();
    const frames = this.scope(press.shift);
    const objection = this.objection(key, frames);
    if (objection) return this.refuse(objection);
    if (key === "F") return this.askNothing(frames);
    this.settle(key, frames, press);
  }

  // Boxes that were judged one by one keep their word, so C means then what B means.
  settle(key, frames, press) {
    const before = snapshot(this.item);
    const touched = frames.some((frame) => frame.boxes.some((box) => box.word));
    for (const frame of frames) decide(frame, key);
    const told = frames.map((frame) => ({ frame, boxes: frame.problem ? [] : frame.boxes, statement: frame.statement }));
    this.record(key === "C" && touched ? "B" : key, told, before);
    this.announce({ C: "Correct", B: "All boxed", N: "Nothing here", F: "Nothing here" }[key]);
    this.onward(press);
  }

  skip(press) {
    if (this.item?.kind === "grid") {
      this.past.push({ op_id: null, item: this.item, before: snapshot(this.item) });
      this.item.done = true;
      return this.advance(press.time);
    }
    if (!this.item) return;
    const frames = this.scope(press.shift);
    const objection = this.objection("S", frames);
    if (objection) return this.refuse(objection);
    const before = snapshot(this.item);
    const open = frames.filter((frame) => !frame.statement);
    for (const frame of open) frame.statement = "unsure";
    if (open.length) this.record("S", open.map((frame) => ({ frame, boxes: [], statement: "unsure" })), before);
    this.announce("Skipped");
    this.onward(press);
  }

  onward(press) {
    const { frames } = this.item;
    this.item.done = frames.every((frame) => frame.statement);
    if (this.item.done) return this.advance(press.time);
    this.drawing = false;
    const next = frames.findIndex((frame, index) => index > this.index && !frame.statement);
    this.go(next >= 0 ? next : frames.findIndex((frame) => !frame.statement));
    this.renderAll();
  }

  askNothing(frames) {
    this.question = { frames, some: frames.some((frame) => !frame.problem && frame.boxes.length) };
    this.renderBar();
    this.announce(`${this.question.some ? "Every box is wrong. " : ""}Is nothing here? Y: nothing here. M: draw what is here.`);
  }

  answer(nothing, press) {
    if (!this.question) return;
    const { frames, some } = this.question;
    this.question = null;
    if (nothing) return this.settle("F", frames, press);
    const before = snapshot(this.item);
    const boxed = frames.filter((frame) => frame.boxes.length && !frame.problem);
    for (const frame of boxed) for (const box of frame.boxes) box.word = "false_positive";
    if (some) this.record("F", boxed.map((frame) => ({ frame, boxes: frame.boxes, statement: null })), before);
    this.setDrawing(true);
    this.renderAll();
  }

  // Everything that was said goes out as an explicit list; before it is acknowledged it waits in the outbox.
  record(key, told, before, item = this.item) {
    const single = item.kind !== "grid" && (this.mode === "single" || told.length < item.frames.length);
    const message = {
      type: "verdict",
      op_id: uuid(),
      item_id: item.id,
      key,
      source: item.kind === "grid" ? "grid" : single ? "single" : "strip",
      shown_ms: Math.round(performance.now() - (this.shown?.at ?? performance.now())),
      frames: told.map(({ frame, boxes, statement }) => ({
        frame_id: frame.id,
        revision: this.revisions.get(frame.id) ?? frame.revision,
        statement,
        boxes: boxes.map(spoken),
      })),
    };
    item.message = null;
    this.past.push({ op_id: message.op_id, item, before });
    this.past.splice(0, Math.max(0, this.past.length - 50));
    this.outbox.add(message);
    this.renderSaving();
  }

  undo(press) {
    this.flush();
    const step = this.past.pop();
    if (!step) return this.refuse("There is nothing to undo");
    restore(step.item, step.before);
    step.item.done = false;
    if (!this.items.includes(step.item)) this.items.splice(Math.max(0, this.items.indexOf(this.item)), 0, step.item);
    const message = { type: "undo", op_id: uuid(), target_op: step.op_id, item_id: step.item.id };
    if (step.op_id) this.outbox.add(message);
    this.show(step.item, press.time);
    this.say("Undone");
    this.renderSaving();
  }

  // -- single boxes

  select(box) {
    if (box === this.selected) return;
    this.flush();
    this.selected = box;
    this.stage.draw();
    this.renderContext();
    if (box) this.announce(`Box: ${this.nameOf(box)}`);
  }

  judgeBox(word, key) {
    const box = this.selected;
    const objection = this.readOnly ? "This home is read-only: no verdict can be stored" : this.notYet([this.frame]);
    if (!box || objection) return this.refuse(objection ?? "Select a box first, with Tab or a click");
    this.flush();
    const before = snapshot(this.item);
    box.word = word === "correct" && box.kind === "drawn" ? "missed" : word;
    this.record(key, [{ frame: this.frame, boxes: [box], statement: null }], before);
    this.announce(`${box.label} ${WORDS[box.word]}`);
    this.refresh();
  }

  removeBox() {
    const box = this.selected;
    if (!box) return this.refuse("Select a box first, with Tab or a click");
    this.judgeBox("false_positive", "Delete");
    if (box.kind === "drawn" && box.word === "false_positive") {
      this.frame.boxes = this.frame.boxes.filter((other) => other !== box);
      this.select(null);
      this.refresh();
    }
  }

  newBox() {
    return { box_key: `drawn:${uuid()}`, detection_id: null, label: this.label, score: null, box: [0, 0, 1, 1], kind: "drawn", word: "missed" };
  }

  add(box) {
    const objection = this.readOnly ? "This home is read-only: no verdict can be stored" : this.notYet([this.frame]);
    if (objection) return this.refuse(objection);
    this.flush();
    const before = snapshot(this.item);
    this.frame.boxes.push(box);
    this.selected = box;
    this.record("M", [{ frame: this.frame, boxes: [box], statement: null }], before);
    this.announce(`${box.label} drawn. B when everything is boxed.`);
    this.refresh();
  }

  placeBox() {
    const { width, height } = this.frame;
    const [x, y] = [this.stage.center[0] * width, this.stage.center[1] * height];
    const size = [width / this.stage.zoom / 5, height / this.stage.zoom / 5];
    this.add(Object.assign(this.newBox(), { box: shifted([x - size[0] / 2, y - size[1] / 2, ...size], [0, 0], this.frame) }));
  }

  // A box was moved with the pointer; `old` is where it lay.
  changed(box, old) {
    const now = box.box;
    box.box = old;
    const before = snapshot(this.item);
    box.box = now;
    this.adjust(box, before);
    this.flush();
  }

  nudge(key, { alt, shift }) {
    const step = Math.max(1, Math.round(1 / this.stage.scale)) * (shift ? 10 : 1);
    const way = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[key];
    const before = this.adjusting?.before ?? snapshot(this.item);
    const { box } = this.selected;
    this.selected.box = alt ? resized(box, "se", way, this.frame) : shifted(box, way, this.frame);
    this.adjust(this.selected, before);
  }

  adjust(box, before) {
    if (box.kind !== "drawn") box.word = "adjusted";
    clearTimeout(this.adjusting?.timer);
    this.adjusting = { box, before, item: this.item, frame: this.frame, timer: setTimeout(() => this.flush(), ADJUST_MS) };
    this.refresh();
  }

  // A nudged box is sent when the hand rests, or at once when something else happens.
  flush() {
    const { adjusting } = this;
    if (!adjusting) return;
    clearTimeout(adjusting.timer);
    this.adjusting = null;
    this.record("adjust", [{ frame: adjusting.frame, boxes: [adjusting.box], statement: null }], adjusting.before, adjusting.item);
  }

  relabel(number) {
    const label = this.classes[number - 1];
    if (!label) return;
    const { selected } = this;
    if (!selected) this.label = label;
    else {
      const before = snapshot(this.item);
      selected.label = label;
      this.adjust(selected, before);
      this.flush();
    }
    this.announce(label);
    this.renderContext();
  }

  // -- grid

  confirmPage(press) {
    if (this.item?.kind !== "grid") return;
    const { crops } = this.item;
    const objection = this.readOnly ? "This home is read-only: no verdict can be stored" : this.notYet(crops);
    if (objection) return this.refuse(objection);
    const before = snapshot(this.item);
    const said = crops.filter((crop) => crop.word !== "unsure" && !crop.problem);
    const ids = [...new Set(said.map((crop) => crop.frame_id))];
    const told = ids.map((id) => {
      const boxes = said.filter((crop) => crop.frame_id === id);
      return { frame: { id, revision: boxes[0].revision }, boxes, statement: null };
    });
    if (told.length) this.record("Enter", told, before);
    this.item.done = true;
    this.announce("Page confirmed");
    this.advance(press.time);
  }

  // -- keys, clicks, choices

  keydown(event) {
    if (event.isComposing || event.keyCode === 229 || event.ctrlKey || event.metaKey) return;
    event.stopPropagation(); // the notebook has single-letter keys of its own
    if (isTyping(event.target)) return;
    const press = { shift: event.shiftKey, alt: event.altKey, time: event.timeStamp };
    const native = event.target !== this.root && ["Enter", " ", "Tab"].includes(event.key) && event.target.closest("button");
    if (native) return;
    this.leaving = false;
    if (this.pressed(event, press)) event.preventDefault();
    if (!this.leaving) this.keepFocus();
  }

  // A button that is gone has taken the focus with it, and the keys would be dead.
  keepFocus() {
    const at = document.activeElement;
    if (!this.root.contains(at) || at.closest("[hidden]")) this.root.focus({ preventScroll: true });
  }

  // Says whether the key was one of ours.
  pressed(event, press) {
    const { key, repeat } = event;
    const name = KEYS[key.toLowerCase()];
    if (key === "Escape") return this.escape() ?? true;
    if (this.playing && name !== "play") this.play(false);
    if (!this.helpCard.hidden) return name === "help" ? (this.toggleHelp(), true) : false;
    if (this.question) return this.questionKey(key, press, repeat);
    if (key === "Tab") return this.tab(press.shift);
    if (key.startsWith("Arrow")) return this.arrow(key, press);
    if (repeat) return Boolean(name);
    if (this.item?.kind === "grid" && this.gridKey(key, press)) return true;
    if (key === "Delete" || key === "Backspace") return this.removeBox(), true;
    if (key === "Enter" && this.drawing) return this.placeBox(), true;
    if (/^[1-9]$/.test(key) && this.item?.kind === "strip") return this.relabel(Number(key)), true;
    if (press.alt || !name) return false;
    return this.act(name, press), true;
  }

  questionKey(key, press, repeat) {
    const wanted = { y: true, enter: true, m: false }[key.toLowerCase()];
    if (repeat || key.length > 1 && wanted === undefined) return key !== "Tab";
    if (wanted === undefined) this.refuse("First answer: Y for nothing here, M to draw, Esc to go back");
    else this.answer(wanted, press);
    return true;
  }

  gridKey(key, press) {
    const letter = key.toLowerCase();
    if (key === " ") this.crops.toggle();
    else if (key === "Enter") this.confirmPage(press);
    else if (/^[1-9]$/.test(key)) this.crops.toggle(Number(key) - 1);
    else if (letter === "u") this.crops.toggle(this.crops.at, "unsure");
    else if (letter === "c") this.crops.all("correct");
    else if (letter === "f") this.crops.all("false_positive");
    else return "nmbhp+-0".includes(letter);
    return true;
  }

  // Tab walks over the boxes, and leaves them at the ends as everywhere else.
  tab(backwards) {
    const boxes = this.boxesHidden || this.frame?.problem ? [] : (this.frame?.boxes ?? []);
    const place = boxes.indexOf(this.selected);
    const next = this.selected ? place + (backwards ? -1 : 1) : backwards ? -1 : 0;
    this.select(boxes[next] ?? null);
    return Boolean(boxes[next]);
  }

  arrow(key, press) {
    if (!this.item) return false;
    if (this.item.kind === "grid") this.crops.step(key);
    else if (this.selected) this.nudge(key, press);
    else if (key === "ArrowLeft" || key === "ArrowRight") this.go(this.index + (key === "ArrowLeft" ? -1 : 1));
    else return false;
    return true;
  }

  escape() {
    if (!this.helpCard.hidden) return this.toggleHelp();
    if (this.question) {
      this.question = null;
      return this.renderBar();
    }
    if (this.playing) return this.play(false);
    if (this.selected) return this.select(null);
    if (this.drawing) return this.setDrawing(false);
    this.leaving = true;
    document.activeElement?.blur();
  }

  act(name, press) {
    const needsFrame = !["undo", "scores", "grid", "help", "again", "close"].includes(name);
    if (needsFrame && !this.item) return this.refuse("There is nothing on the screen to judge");
    this.actions[name](press);
  }

  click(event) {
    const control = event.target.closest("[data-action], [data-frame], [data-mode], [data-what]");
    if (!control || !this.root.contains(control)) return; // JupyterLab's own elements have such attributes as well
    const { action, frame, mode, what } = control.dataset;
    if (event.detail) this.root.focus({ preventScroll: true }); // Space must not press a clicked button again
    if (action) this.act(action, { shift: event.shiftKey, alt: event.altKey, time: event.timeStamp });
    else if (frame) this.go(Number(frame));
    else this.choose(mode ?? (this.mode === "grid" && what !== "queue" ? "strip" : this.mode), what && { what });
    this.keepFocus();
  }

  change(event) {
    const { name, value } = event.target;
    if (name === "what" && value === "night") return this.renderChooser("night");
    const choice = { what: "queue", night: null, camera: null, ...this.choice, [name]: value || null };
    if (name === "night") choice.what = "night";
    this.choose(this.mode, choice);
  }

  choose(mode, choice) {
    this.flush();
    this.mode = mode;
    this.choice = choice ? { night: null, camera: this.choice?.camera ?? null, ...choice } : this.choice;
    this.dropped = this.generation;
    this.forget(null);
    this.asking = performance.now();
    this.send({ type: "choose", mode: this.mode, choice: this.choice });
    this.root.focus({ preventScroll: true });
  }

  setDrawing(on) {
    if (on && (this.readOnly || this.item?.kind !== "strip")) return this.refuse("Nothing can be drawn here");
    if (on && this.boxesHidden) this.hideBoxes(false);
    this.drawing = on;
    this.selected = null;
    this.stage.draw();
    this.renderContext();
    this.renderBar();
    if (on) this.announce("Drawing: drag a box around the animal, or press Enter for a box in the middle. Escape ends it.");
  }

  setScope(alone) {
    this.onlyThis = alone;
    this.renderStrip();
    this.announce(alone ? "Verdicts count for this frame" : "Verdicts count for all frames");
  }

  hideBoxes(hidden) {
    this.boxesHidden = hidden;
    this.selected = null;
    if (!hidden) this.shown?.large.clear(); // they count as seen when they have been painted again
    this.refresh();
    this.watch();
    this.tools.querySelector(".do-boxes").setAttribute("aria-pressed", String(hidden));
    this.announce(hidden ? "Boxes hidden" : "Boxes shown");
  }

  hideScores(hidden) {
    this.scoresHidden = hidden;
    attempt(() => localStorage.setItem("deerml-review-scores", hidden ? "hidden" : "shown"));
    this.tools.querySelector(".do-scores").setAttribute("aria-pressed", String(hidden));
    this.renderAll();
    this.announce(hidden ? "Scores hidden" : "Scores shown");
  }

  // -- what is said

  announce(text) {
    // The same words twice are read twice only when the text differs.
    this.live.textContent = this.live.textContent === text ? `${text}\u00a0` : text;
  }

  say(text, { keep = false } = {}) {
    this.announce(text);
    if (keep) {
      this.banner.hidden = false;
      return this.banner.replaceChildren(icon("alert"), text);
    }
    this.toast.textContent = text;
    this.toast.getAnimations().forEach((animation) => animation.cancel());
    this.toast.animate([{ opacity: 1 }, { opacity: 1, offset: 0.85 }, { opacity: 0 }], { duration: 2600 });
  }

  refuse(text) {
    this.say(text);
    this.root.dispatchEvent(new CustomEvent("deerml:refused", { detail: { text }, bubbles: true }));
    const flash = [{ outlineColor: "var(--warn)" }, { outlineColor: "transparent" }];
    const shake = [0, -6, 5, -3, 0].map((x) => ({ transform: `translateX(${x}px)` }));
    this.main.animate(wantsStill() ? flash : shake, { duration: wantsStill() ? 500 : 200 });
  }

  nameOf(box) {
    const score = box.score === null || box.score === undefined || this.scoresHidden ? "" : ` ${box.score.toFixed(2)}`;
    const kind = { alarm: "alarm", suggestion: "suggestion", drawn: "drawn" }[box.kind];
    return `${box.label}${score} · ${WORDS[box.word] ?? kind}`;
  }

  describe(frame) {
    const place = `Frame ${this.item.frames.indexOf(frame) + 1} of ${this.item.frames.length}, ${frame.time ?? "time unknown"}`;
    if (frame.problem) return `${place}. ${PROBLEMS[frame.problem]}.`;
    const boxes = frame.boxes.map((box) => this.nameOf(box)).join("; ");
    return `${place}. ${frame.boxes.length ? `${plural(frame.boxes.length, "box", "boxes")}: ${boxes}` : "No box"}.`;
  }

  // -- drawing the parts

  renderAll() {
    const { item } = this;
    this.root.dataset.kind = item?.kind ?? (this.ended ? "end" : "loading");
    this.stage.view.hidden = Boolean(item ? item.kind === "grid" : this.ended);
    this.crops.view.hidden = item?.kind !== "grid";
    this.ending.hidden = Boolean(item) || !this.ended;
    this.tools.hidden = this.caption.hidden = item?.kind !== "strip";
    if (item?.kind === "grid") this.crops.show(item);
    if (item?.kind === "strip") this.showStage();
    if (!item && this.ended) this.renderEnd();
    if (!item && !this.ended) this.renderLoading();
    if (item) this.banner.hidden = !(item.message || this.readOnly);
    if (item?.message) this.banner.replaceChildren(icon("alert"), item.message);
    this.renderHeader();
    this.renderStrip();
    this.renderContext();
    this.renderBar();
  }

  refresh() {
    if (this.item?.kind !== "strip") return;
    this.showStage();
    this.renderStrip();
    this.renderContext();
  }

  showStage() {
    this.stage.show(this.frame, this.pictures.get(frameKey(this.frame.id)));
    const { frames } = this.item;
    const place = frames.length > 1 ? `${this.index + 1} of ${frames.length}` : "";
    this.caption.textContent = [this.frame.time, place].filter(Boolean).join("  ·  ");
  }

  renderLoading() {
    this.stage.frame = null;
    this.stage.picture.replaceChildren();
    this.stage.overlay.replaceChildren();
    this.stage.tags.replaceChildren();
    this.stage.card.hidden = false;
    this.stage.card.replaceChildren("Loading the next frames…");
    this.stage.view.setAttribute("aria-label", "Loading the next frames");
  }

  renderHeader() {
    const { item } = this;
    const part = item?.part && item.part[1] > 1 ? ` · part ${item.part[0]} of ${item.part[1]}` : "";
    this.title.textContent = item ? `${item.title}${part}` : this.ended ? "All done" : "Review";
    this.subtitle.textContent = item || !this.ended ? this.words ?? "" : ""; // what was asked is over
    const state = JSON.stringify([this.mode, this.choice, this.cameras]);
    if (state !== this.chooserState) this.renderChooser(this.choice?.what ?? "queue");
    this.chooserState = state;
  }

  renderChooser(what) {
    const mode = (name, label) =>
      h("button", { type: "button", "data-mode": name, "aria-pressed": String(this.mode === name), title: label }, icon(name), h("span", {}, label));
    const select = (name, label, options, chosen) =>
      h("select", { name, "aria-label": label }, ...options.map(([value, text]) => h("option", { value, selected: value === chosen }, text)));
    const whats = [["queue", "Queue"], ["replay", "Replay"], ["disputed", "Disputed"], ["skipped", "Skipped"], ["night", "A night…"]];
    const cameras = [["", "All cameras"], ...this.cameras.map(({ id, name }) => [String(id), name])];
    this.chooser.replaceChildren(
      h("div", { class: "modes", role: "group", "aria-label": "Mode" }, mode("strip", "Strip"), mode("single", "Single"), mode("grid", "Grid")),
      select("what", "What to review", whats, what),
      ...(what === "night" ? [h("input", { type: "date", name: "night", "aria-label": "Night", value: this.choice?.night ?? "" })] : []),
      ...(this.cameras.length > 1 ? [select("camera", "Camera", cameras, String(this.choice?.camera ?? ""))] : []),
      this.button("help", "round"),
    );
  }

  renderProgress(progress) {
    if (!progress) return;
    this.progress = progress;
    const { done, total, images_a_minute: pace, minutes_left: left } = progress;
    const texts = [`${done} of ${total}`];
    if (pace) texts.push(`${Math.round(pace)} images a minute`);
    if (left) texts.push(`${left < 1 ? "under a minute" : plural(Math.round(left), "minute")} left`);
    this.figures.textContent = texts.join("  ·  ");
    this.filled.style.transform = `scaleX(${total ? clamp(done / total, 0, 1) : 0})`;
    for (const [name, value] of [["now", done], ["max", total || 1], ["text", texts[0]]]) this.meter.setAttribute(`aria-value${name}`, value);
    this.renderSaving();
  }

  // Quiet while all is well: a save takes milliseconds, and a text that flickers is worse than none.
  renderSaving() {
    const count = this.outbox.waiting.size;
    const first = this.outbox.waiting.values().next().value;
    if (!count) this.busy = false;
    const slow = first?.sent && performance.now() - first.sent > 800;
    const text = !this.online ? (count ? `Offline · ${count} unsaved` : "Offline") : count && (slow || this.busy) ? "Saving…" : "";
    this.saving.hidden = !text;
    if (this.saving.textContent !== text) this.saving.textContent = text;
  }

  renderStrip() {
    const frames = this.item?.frames ?? [];
    this.row.hidden = frames.length < 2;
    if (this.row.hidden) return;
    this.strip.replaceChildren(...frames.map((frame, index) => this.thumb(frame, index)));
    const alone = this.mode === "single" || this.onlyThis;
    const text = alone ? "This frame" : `All ${frames.length} frames`;
    const attributes = { type: "button", class: "scope", "data-action": "scope", "aria-pressed": String(alone), disabled: this.mode === "single" };
    const hint = "What a verdict counts for. Shift with a key does it once.";
    this.row.replaceChildren(this.strip, h("button", { ...attributes, title: hint }, icon(alone ? "one" : "strip"), h("span", {}, h("small", {}, "Counts for"), text)));
  }

  thumb(frame, index) {
    const [mark, word] = this.mark(frame);
    const current = index === this.index;
    const boxes = svg("svg", { viewBox: `0 0 ${frame.width} ${frame.height}`, preserveAspectRatio: "none", "aria-hidden": "true" });
    for (const { box: [x, y, width, height], kind, word: said } of this.boxesHidden || frame.problem ? [] : frame.boxes) {
      const attributes = { x, y, width, height, class: `${kind} ${said ?? "unjudged"}`, "vector-effect": "non-scaling-stroke" };
      boxes.append(svg("rect", attributes));
    }
    const label = `Frame ${index + 1}, ${frame.time ?? ""}, ${plural(frame.boxes.length, "box", "boxes")}, ${word}`;
    const picture = frame.problem ? icon("alert") : (this.pictures.get(frameKey(frame.id))?.thumb ?? "");
    return h(
      "button",
      { type: "button", class: "thumb", "data-frame": String(index), "aria-current": current ? "true" : null, "aria-label": label, tabindex: current ? "0" : "-1" },
      picture,
      boxes,
      mark ? h("span", { class: `mark ${word.replace(" ", "-")}` }, icon(mark)) : null,
    );
  }

  mark(frame) {
    if (frame.problem) return [null, "cannot be shown"];
    if (MARKS[frame.statement]) return MARKS[frame.statement];
    if (frame.state === "disputed") return MARKS.disputed;
    return frame.boxes.some((box) => box.word) ? MARKS.in_progress : [null, "not judged"];
  }

  // A small bar on the picture: for drawing, and for the selected box
  renderContext() {
    const box = this.selected;
    this.context.hidden = this.item?.kind !== "strip" || !(box || this.drawing);
    if (this.context.hidden) return;
    const small = (name, key, label, mark) => this.button(name, "small", { key, label, icon: mark, help: label });
    const classes = this.classes.length > 1 ? [h("span", { class: "hint" }, `1–${Math.min(9, this.classes.length)}: ${box?.label ?? this.label}`)] : [];
    const done = small("close", "Esc", "Done", "check");
    const judging = [small("boxRight", "Shift+C", "Right", "check"), small("boxWrong", "Shift+F", "Wrong", "cross")];
    const parts = box
      ? [h("strong", {}, this.nameOf(box)), ...(box.kind === "drawn" ? [small("remove", "Delete", "Remove", "bin")] : judging)]
      : [h("strong", {}, `Draw around the missed ${this.label || "animal"}`), small("place", "Enter", "Place a box", "draw")];
    this.context.replaceChildren(...parts, ...classes, done);
  }

  renderBar() {
    const kind = this.item?.kind ?? "none";
    const state = this.question ? "question" : kind;
    const layouts = {
      question: () => this.questionBar(),
      grid: () => this.gridBar(),
      none: () => (this.past.length ? [this.button("undo")] : []),
      strip: () => BAR.map((name) => this.button(name)),
    };
    // The buttons of the strip never change: leaving them in place keeps focus and time.
    if (state === "strip" && this.bar.dataset.state === "strip") return this.barPressed();
    this.bar.dataset.state = state;
    this.bar.replaceChildren(...layouts[state]());
    this.barPressed();
  }

  barPressed() {
    this.bar.querySelector(".do-missed")?.setAttribute("aria-pressed", String(this.drawing));
  }

  questionBar() {
    const { some, frames } = this.question;
    const where = frames.length > 1 ? `these ${frames.length} frames` : "this frame";
    const text = `${some ? "Every box is wrong. " : ""}Is there nothing on ${where}?`;
    const change = (key, label, mark) => ({ key, label, icon: mark, help: label });
    return [
      h("p", { class: "question" }, text),
      this.button("yes", "key", change("Y", "Nothing here", "empty")),
      this.button("no", "key", change("M", "Draw what is", "draw")),
      this.button("close", "key", change("Esc", "Back", "undo")),
    ];
  }

  gridBar() {
    const wrong = this.item.crops.filter((crop) => crop.word === "false_positive").length;
    const change = (key, label, mark) => ({ key, label, icon: mark, help: label });
    return [
      this.button("confirm", "key", { ...change("Enter", "Confirm page", "check"), help: `${this.item.crops.length - wrong} right, ${wrong} wrong` }),
      this.button("allRight", "key", change("C", "All right", "boxed")),
      this.button("allWrong", "key", change("F", "All wrong", "cross")),
      this.button("skip", "key", { label: "Skip page" }),
      this.button("undo"),
      this.button("grid", "key", { label: "Leave grid", icon: "strip" }),
    ];
  }

  renderEnd() {
    const what = (name, label, mark) => h("button", { type: "button", class: "key", "data-what": name }, icon(mark), h("span", { class: "label" }, label));
    const said = Object.entries(this.progress?.by ?? {}).map(([word, count]) => `${count} ${word.replaceAll("_", " ")}`);
    this.ending.replaceChildren(
      h("div", { class: "seal" }, icon("check")),
      h("h3", {}, this.ended.because),
      h("p", {}, this.ended.summary ?? ""),
      said.length ? h("p", { class: "said" }, said.join("  ·  ")) : "",
      h("div", { class: "more" },
        what("skipped", "Look at skipped", "skip"),
        what("disputed", "Look at disputed", "differ"),
        this.button("grid", "key", { label: "Go through a grid" }),
        this.button("again", "key", { key: "", label: "Look for more", icon: "undo", help: "Ask again whether there is more" })),
    );
  }

  toggleHelp() {
    const { helpCard } = this;
    helpCard.hidden = !helpCard.hidden;
    if (helpCard.hidden) return this.root.focus({ preventScroll: true });
    const rows = [...Object.values(ACTIONS).map(({ key, help }) => [key, help]), ...MORE_HELP];
    const close = h("button", { type: "button", class: "round", "data-action": "help", "aria-label": "Close the help" }, icon("cross"));
    const list = h("dl", {}, ...rows.map(([key, text]) => h("div", {}, h("dt", {}, h("kbd", {}, key)), h("dd", {}, text))));
    helpCard.replaceChildren(h("div", { role: "dialog", "aria-modal": "true", "aria-label": "Keys" }, h("h3", {}, "Keys"), close, list));
    close.focus();
  }
}

// -- items and what was said of them ------------------------------------------------------------------------------

const parts = (item) => item.frames ?? item.crops;
const keyOf = (part) => (part.box_key ? cropKey(part.box_key) : frameKey(part.id));
const snapshot = (item) => structuredClone(parts(item));
const spoken = ({ box_key, detection_id, word, label, box }) => ({ box_key, detection_id, word, label, box: rounded(box) });

// Into the objects that are on the screen, so that the pictures that belong to them stay
function restore(item, before) {
  if (item.frames) item.frames = structuredClone(before);
  else item.crops = structuredClone(before);
}

// What a key means for one frame: a word for each box, and a statement on the frame
function decide(frame, key) {
  if (frame.problem) {
    frame.statement = "unsure"; // nobody can say more of a frame that cannot be shown
    return;
  }
  for (const box of frame.boxes) box.word = "CB".includes(key) ? (box.word ?? "correct") : "false_positive";
  frame.statement = frame.boxes.some(SURVIVES) ? "all_boxed" : "nothing_here";
}

export default {
  render({ model, el }) {
    const review = new Review(model, el);
    return () => review.close();
  },
};
