// Run by tests/test_demo_tracks.py: page.js with the few parts of a page that its arrows need.
const assert = require("assert"), fs = require("fs"), path = require("path"), vm = require("vm");

class Node {
  constructor(name) { Object.assign(this, { name, values: {}, children: [], dataset: {} }); }
  setAttribute(key, value) { this.values[key] = String(value); if (key === "data-n") this.dataset.n = String(value); }
  getAttribute(key) { return this.values[key] ?? null; }
  appendChild(child) { child.parent = this; this.children.push(child); return child; }
  replaceChildren() { this.children = []; }
  closest(selector) {
    for (let node = this; node; node = node.parent)
      if ((selector === ".board svg" && node === svg) || (selector === ".arrow" && node.values.class === "arrow")) return node;
    return null;
  }
  querySelector(selector) { return selector === ".arrows" ? group : selector === ".arrow" ? (group.children[0] ?? null) : null; }
  part(name) { return this.children.find((child) => child.values.class === name); }
  setPointerCapture() {}
  matches() { return false; }
  getBoundingClientRect() { return { left: 100, top: 50, width: 560, height: 320 }; }
}
const svg = new Node("svg"), group = svg.appendChild(new Node("g")), handlers = {};
svg.dataset = { w: "112", h: "64" };
let asked = 0;
const document = {
  addEventListener: (name, handler) => (handlers[name] ??= []).push(handler),
  querySelector: (selector) => (selector === ".board svg" ? svg : selector === "#checked" ? { click: () => asked++ } : null),
  querySelectorAll: () => [],
  createElementNS: (_, name) => new Node(name),
  documentElement: {},
};
const storage = { getItem: () => null, setItem: () => {} }, window = { addEventListener: () => {} };
const around = { document, window, localStorage: storage, sessionStorage: storage, crypto: require("crypto").webcrypto };
Object.assign(around, { MutationObserver: class { observe() {} }, HTMLCanvasElement: class {}, HTMLVideoElement: class {} });
vm.runInNewContext(fs.readFileSync(path.join(__dirname, "../../sample/studio/page.js"), "utf8"), around);

const at = (target, x, y) => ({ target, clientX: 100 + 560 * x, clientY: 50 + 320 * y, buttons: 1, pointerId: 1, preventDefault() {} });
const fire = (name, event) => handlers[name].forEach((handler) => handler(event));
const sent = () => window.studio.withMask([0, 0], 0, 1)[1];
const near = (a, b) => assert(Math.hypot(a[0] - b[0], a[1] - b[1]) < 1e-6, `${a} is not ${b}`);
function drag(target, from, to) {
  fire("pointerdown", at(target, ...from));
  for (let i = 1; i <= 100; i++) fire("pointermove", at(target, from[0] + (i / 100) * (to[0] - from[0]), from[1] + (i / 100) * (to[1] - from[1])));
  fire("pointerup", at(target, ...to));
}

drag(svg, [0.2, 0.5], [0.8, 0.5]);
assert.deepEqual([sent().length, sent()[0].points.length, asked], [1, 40, 1]);
near(sent()[0].points[0], [0.2, 0.5]);
near(sent()[0].points.at(-1), [0.8, 0.5]);
drag(group.children[0].part("end"), [0.8, 0.5], [0.2, 0.9]); // turned and stretched about its start
near(sent()[0].points[0], [0.2, 0.5]);
near(sent()[0].points.at(-1), [0.2, 0.9]);
drag(group.children[0].part("start"), [0.2, 0.5], [0.3, 0.5]); // moved
near(sent()[0].points.at(-1), [0.3, 0.9]);
drag(svg, [0.6, 0.6], [0.6, 0.6]); // a click: held in place
assert.deepEqual(sent().map((one) => one.points.length), [40, 1]);
assert.equal(group.children[1].part("end"), undefined);
drag(group.children[0].part("gone"), [0.3, 0.5], [0.3, 0.5]);
assert.deepEqual([sent().length, sent()[0].points.length, asked], [1, 1, 5]);
window.studio.hold({ mask: null, tracks: [{ points: [[0.1, 0.1], [0.5, 0.5]] }] }); // restored
assert.equal(JSON.stringify(sent()), '[{"points":[[0.1,0.1],[0.5,0.5]]}]');
assert.deepEqual(window.studio.withMask([0], 0), [null]);
