// What is said of the classes: `said` is the whole state, class -> {name, merge, stuff, noise}, as in names.yaml. Every
// change goes through `change`, can be taken back, and is kept in the browser under the fits' fingerprints. What is seen
// of it, and the keys, are in clusters.js.
"use strict";
const $ = (selector, within = document) => within.querySelector(selector);
const page = document.body.dataset;
const fits = JSON.parse(page.fits);
const classes = JSON.parse(page.classes);
const total = classes.things + classes.stuff;
const rows = new Map([...document.querySelectorAll(".row")].map((row) => [Number(row.id.slice(1)), row]));
const order = [...rows.keys()];
const place = "u2label names " + [page.run, fits.things, fits.stuff].join(" ");
let said = new Map();
let before = [];

const entry = (id) => said.get(id) || {};
const isStuffClass = (id) => id > classes.things;
const ownName = (id) => (isStuffClass(id) ? "stuff " + (id - classes.things) : "thing " + id);
const root = (id) => (entry(id).merge === undefined ? id : root(entry(id).merge));
const isThing = (id) => !isStuffClass(id) && !entry(id).stuff;
const nameOf = (id) => entry(root(id)).name || ownName(root(id));
const members = (id) => [...said.keys()].filter((other) => entry(other).merge === id);
const fold = (text) => text.toLowerCase();
const tidy = (text) => text.normalize("NFC").replace(/\p{Z}+/gu, " ").replace(/\p{C}/gu, "").trim();
const title = (id) => (entry(id).name ? entry(id).name + " (" + ownName(id) + ")" : ownName(id));

function stateOf(id) {
  const own = entry(id);
  if (own.noise) return "noise";
  if (own.merge !== undefined) return "merged";
  return own.name || own.stuff ? "named" : "open";
}

function say(text, isFault = false) {
  $("#said").textContent = text;
  $("#said").classList.toggle("fault", isFault);
}

// Changes: each works on a copy, so that one that is refused leaves nothing behind.

class Refused extends Error {}

function change(text, edit) {
  const old = said;
  said = new Map([...old].map(([id, one]) => [id, { ...one }]));
  try {
    edit();
  } catch (error) {
    said = old;
    if (!(error instanceof Refused)) throw error;
    say(error.message, true);
    render();
    return false;
  }
  for (const [id, one] of said) if (!Object.keys(one).length) said.delete(id);
  if (asYaml(said) === asYaml(old)) {
    said = old;
    render();
    return true;
  }
  before.push(old);
  keep();
  render();
  say(text);
  return true;
}

function setName(id, name) {
  if (name === (entry(id).name || "")) return render() || true;
  const twin = name && order.find((other) => root(other) === other && other !== id && !entry(other).noise && fold(nameOf(other)) === fold(name));
  if (twin) return merge(id, twin);
  return change(name ? ownName(id) + " is " + name : ownName(id) + " has no name", () => {
    const { name: _, merge: __, noise: ___, ...rest } = entry(id);
    said.set(id, name ? { name, ...rest } : rest);
  });
}

function merge(id, other) {
  const target = root(other);
  return change(ownName(id) + " is the same as " + title(target), () => {
    if (target === id) throw new Refused(title(other) + " is " + title(id) + " already");
    if (entry(target).noise) throw new Refused(title(target) + " is noise; nothing can be the same as that");
    const joining = [id, ...members(id)];
    const stuff = joining.find(isStuffClass);
    if (stuff && isThing(target)) throw new Refused(ownName(stuff) + " is stuff, and " + title(target) + " are things: mark those as stuff first");
    const name = entry(id).name;
    if (name && !entry(target).name) said.set(target, { name, ...entry(target) });
    for (const one of joining) said.set(one, { merge: target });
  });
}

function toggleNoise(id) {
  const isNoise = entry(id).noise;
  return change(isNoise ? ownName(id) + " is no noise" : ownName(id) + " is noise", () => {
    for (const one of [id, ...members(id)]) said.set(one, isNoise ? {} : { noise: true });
  });
}

function toggleStuff(id) {
  if (isStuffClass(id)) return say(ownName(id) + " is stuff", true);
  const { name, stuff } = entry(id);
  return change(ownName(id) + (stuff ? " are things" : " is stuff"), () => {
    const member = members(id).find(isStuffClass);
    if (stuff && member) throw new Refused(ownName(member) + " is the same as " + title(id) + ", and is stuff: take that back first");
    said.set(id, { ...(name && { name }), ...(stuff ? {} : { stuff: true }) });
  });
}

function forget(id) {
  return change(ownName(id) + ": nothing is said of it", () => said.delete(id));
}

function undo() {
  if (!before.length) return say("There is nothing to take back");
  said = before.pop();
  keep();
  render();
  say("Taken back");
}

// The file: as `u2label name` writes it, an entry a line.

function asYaml(names) {
  const flow = (one) => "{" + Object.entries(one).map(([key, value]) => JSON.stringify(key) + ": " + JSON.stringify(value)).join(", ") + "}";
  const lines = ["format: u2label names 1", "fits: " + flow(fits), "classes: " + flow(classes), names.size ? "names:" : "names: {}"];
  const inOrder = [...names].sort(([one], [other]) => one - other);
  for (const [id, { name, merge, stuff, noise }] of inOrder) {
    const known = Object.entries({ name, merge, stuff, noise }).filter(([, value]) => value !== undefined);
    lines.push("  " + id + ": " + flow(Object.fromEntries(known)));
  }
  return lines.join("\n") + "\n";
}

function fromYaml(text) {
  const names = new Map();
  for (const [number, line] of text.replace(/^\ufeff/, "").split(/\r?\n/).entries()) {
    if (!line.trim() || line.startsWith("#") || /^names:( \{\})?\s*$/.test(line)) continue;
    const [, key, value] = line.match(/^\s*([a-z]+|\d+): (.*)$/) || [];
    const other = (what) => new Refused("The file is of another " + what + ": its " + key + " is " + value);
    if (key === "format") { if (value !== "u2label names 1") throw other("format"); continue; }
    if (key === "fits" || key === "classes") {
      if (JSON.stringify(parse(value, number)) !== JSON.stringify(key === "fits" ? fits : classes)) throw other("run");
      continue;
    }
    const id = Number(key), one = parse(value, number);
    if (!(id >= 1 && id <= total)) throw new Refused("Line " + (number + 1) + ": there is no class " + key + " (there are 1 to " + total + ")");
    names.set(id, one);
  }
  for (const id of names.keys()) checkMerges(names, id);
  return names;
}

function checkMerges(names, id) {
  const seen = new Set();
  for (let at = id; at !== undefined; at = (names.get(at) || {}).merge) {
    if (seen.has(at) || !(at >= 1 && at <= total)) throw new Refused("The file merges " + id + " in a circle, or with a class that there is not");
    seen.add(at);
  }
}

function parse(text, number) {
  try {
    const found = JSON.parse(text);
    if (found && typeof found === "object" && !Array.isArray(found)) return found;
  } catch {}
  throw new Refused("Line " + (number + 1) + " is not as this page writes it; u2label name RUN --from FILE reads it, and u2label report RUN then shows it here");
}

async function open(file) {
  const text = await file.text();
  change("Opened " + file.name, () => { said = fromYaml(text); });
}

function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([asYaml(said)], { type: "application/yaml" }));
  link.download = "names.yaml";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  say("Saved names.yaml; next: u2label name RUN --from names.yaml");
}

// What the browser keeps.

function keep() {
  try {
    localStorage.setItem(place, asYaml(said));
  } catch {
    $("#forgetful").hidden = false;
  }
}

function recall() {
  for (const [id, row] of rows) if (row.dataset.entry !== "{}") said.set(id, JSON.parse(row.dataset.entry));
  try {
    const kept = localStorage.getItem(place);
    if (kept !== null) said = fromYaml(kept);
  } catch (error) {
    if (error instanceof Refused) say("What this browser has kept cannot be read: " + error.message, true);
    else $("#forgetful").hidden = false;
  }
}
