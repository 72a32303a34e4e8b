// Run by tests/test_demo_shots.py: page.js with the few parts of a page that its storyboard needs.
const assert = require("assert"), fs = require("fs"), path = require("path"), vm = require("vm");

class Node {
  constructor(name) {
    const classList = { add() {}, remove() {}, toggle() {} };
    Object.assign(this, { name, tag: name, values: {}, children: [], dataset: {}, classList });
  }
  focus() { focused = this; }
  setAttribute(key, value) { this.values[key] = String(value); }
  append(...more) { for (const child of more) { child.parent = this; this.children.push(child); } }
  replaceChildren(...more) { this.children = []; this.append(...more); }
  closest(selector) {
    for (let node = this; node; node = node.parent) {
      if (selector === ".story li" && node.tag === "li") return node;
      if (selector === "[data-do=add-shot]" && node === add) return node;
    }
    return null;
  }
  querySelector(selector) {
    if (selector === "li:last-child textarea") return list.children.at(-1).part("prompt");
    return selector === "ol" ? list : selector === "li" ? (list.children[0] ?? null) : selector === "[data-do=add-shot]" ? add : null;
  }
  part(name) { return this.children.find((child) => child.name === name); }
  matches() { return false; }
}
const story = new Node("div"), list = new Node("ol"), add = new Node("button"), handlers = {};
story.dataset = { most: "3", words: "w", seconds: "s", camera: "c", up: "u", down: "d", remove: "r", drag: "g" };
story.append(list, add);
let asked = 0, focused = null;
const document = {
  addEventListener: (name, handler) => (handlers[name] ??= []).push(handler),
  querySelector: (selector) => (selector === ".story" ? story : selector === "#checked" ? { click: () => asked++ } : selector === "#draft" ? { click: () => drafts++ } : null),
  querySelectorAll: () => [],
  createElement: (name) => new Node(name),
  documentElement: {},
};
const storage = { getItem: () => null, setItem: () => {} }, window = { addEventListener: () => {} };
const around = { document, window, localStorage: storage, sessionStorage: storage, crypto: require("crypto").webcrypto };
let waiting = 0, drafts = 0; // of the live preview
Object.assign(around, { setTimeout: (then) => { waiting = then; return 1; }, clearTimeout: () => {} });
Object.assign(around, { MutationObserver: class { observe() {} }, HTMLCanvasElement: class {}, HTMLVideoElement: class {} });
vm.runInNewContext(fs.readFileSync(path.join(__dirname, "../../sample/studio/page.js"), "utf8"), around);

const fire = (name, target, more) => handlers[name].forEach((handler) => handler({ target, preventDefault() {}, ...more }));
const sent = () => JSON.parse(JSON.stringify(window.studio.withMask([0, 0, 0], 0, 1, 2)[2]));
const words = () => sent().map((shot) => shot.prompt).join("");
const row = (n) => list.children[n];
function type(n, name, value) {
  const field = row(n).part(name);
  field.value = value;
  fire("input", field);
}

assert.deepEqual(sent(), []);
for (const letter of "abc") { fire("click", add); assert.equal(focused, list.children.at(-1).part("prompt")); type(list.children.length - 1, "prompt", letter); }
assert.deepEqual([words(), add.disabled, asked], ["abc", true, 6]);
type(1, "seconds", "1.5");
type(1, "camera", "pan=5");
assert.deepEqual(sent()[1], { prompt: "b", seconds: 1.5, camera: "pan=5" });
fire("click", row(1).part("up"));
assert.equal(words(), "bac");
assert.deepEqual([row(0).part("up").disabled, row(2).part("down").disabled, row(1).part("up").disabled], [true, true, false]);
fire("click", row(0).part("down"));
assert.equal(words(), "abc");
const carried = { dataTransfer: { types: [], files: [] } };
fire("dragstart", row(2), carried); // from the end to the beginning
fire("drop", row(0).part("prompt"), carried);
fire("dragend", row(2), carried);
assert.equal(words(), "cab");
fire("drop", row(2), carried); // nothing is carried any more
assert.equal(words(), "cab");
fire("click", row(1).part("remove"));
assert.deepEqual([words(), add.disabled], ["cb", false]);
const quiet = () => { const then = waiting; waiting = 0; then?.call?.(); return drafts; };
assert.equal(quiet(), 1); // of all the changes in one wait
for (const change of [() => type(0, "camera", "pan=3"), () => fire("click", row(0).part("down")), () => fire("click", row(1).part("up")), () => fire("click", add)]) {
  const before = drafts;
  change();
  assert.equal(quiet(), before + 1);
}
fire("click", row(2).part("remove"));
assert.equal(quiet(), 6);
window.studio.hold({ mask: null, shots: [{ prompt: "x", seconds: 2, camera: "" }] }); // restored
assert.deepEqual([words(), row(0).part("prompt").value], ["x", "x"]);
