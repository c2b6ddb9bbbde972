// What the page of clusters does. `said` is the whole state: class -> {name, merge, stuff, noise}, as in names.yaml.
// Every change goes through `change`, which can be taken back and is kept in the browser under the fits' fingerprints.
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

// What is seen.

function render() {
  for (const [id, row] of rows) renderRow(id, row);
  for (const item of document.querySelectorAll(".near li")) renderNear(item);
  renderCounts();
}

function renderRow(id, row) {
  const own = entry(id), state = stateOf(id), input = $(".name", row);
  const look = JSON.stringify([own, nameOf(id), members(id)]);
  if (row.dataset.look === look) return;
  row.dataset.look = look;
  row.classList.remove("open", "named", "merged", "noise");
  row.classList.add(state);
  input.value = own.merge === undefined ? own.name || "" : nameOf(id);
  input.placeholder = own.noise ? "Noise" : "Name";
  $(".noise", row).setAttribute("aria-pressed", String(Boolean(own.noise)));
  if (!isStuffClass(id)) $(".stuff", row).setAttribute("aria-pressed", String(Boolean(own.stuff)));
  const with_ = members(id).map(ownName);
  $(".state", row).textContent = state === "merged" ? "the same as " + title(root(id)) : state === "noise" ? "left out" : with_.length ? "with " + with_.join(", ") : "";
}

function renderNear(item) {
  const id = Number(item.dataset.id), row = item.closest(".row"), own = Number(row.id.slice(1));
  if (!item.firstChild) {
    const picture = $(".kinds img", rows.get(id)), key = [...item.parentNode.children].indexOf(item) + 1;
    const shown = picture ? Object.assign(new Image(), { src: picture.src, alt: "" }) : document.createElement("span");
    const link = Object.assign(document.createElement("a"), { href: "#c" + id });
    link.append(document.createElement("span"), Object.assign(document.createElement("small"), { textContent: item.dataset.similarity }));
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: "merge" });
    button.prepend(Object.assign(document.createElement("b"), { textContent: key }));
    item.append(shown, link, button);
  }
  const name = nameOf(id), link = $("a", item), text = link.firstChild;
  if (text.textContent === name) return;
  text.textContent = name;
  link.title = name;
  $("button", item).setAttribute("aria-label", "Merge " + ownName(own) + " with " + name + ", similarity " + item.dataset.similarity);
}

function renderCounts() {
  const states = order.map(stateOf), count = (state) => states.filter((one) => one === state).length;
  const [named, merged, noise, left] = ["named", "merged", "noise", "open"].map(count);
  const size = (id) => Number(rows.get(id).dataset.size);
  const all = order.reduce((sum, id) => sum + size(id), 0);
  const done = order.reduce((sum, id) => sum + (stateOf(id) === "open" ? 0 : size(id)), 0);
  $("#counts").textContent = named + " named, " + merged + " merged, " + noise + " noise; " + (left ? left + " to go" : "done") + (all ? " (" + Math.round((100 * done) / all) + " % of the instances)" : "");
  for (const [kind, number] of Object.entries({ named, merged, noise })) $("#meter ." + kind).style.width = (100 * number) / order.length + "%";
  $("#meter").setAttribute("aria-label", order.length - left + " of " + order.length + " classes are named, merged or noise");
  $("#undo").disabled = !before.length;
}

function filter() {
  const show = $("#show").value, text = fold(tidy($("#find").value));
  for (const [id, row] of rows) {
    const fits_ = show === "all" || stateOf(id) === show;
    row.hidden = !(fits_ && (!text || fold(nameOf(id)).includes(text) || fold(ownName(id)).includes(text)));
  }
  $("#none").hidden = order.some((id) => !rows.get(id).hidden);
}

// Going about.

const idOf = (element) => { const row = element && element.closest && element.closest(".row"); return row ? Number(row.id.slice(1)) : null; };
const visible = () => order.filter((id) => !rows.get(id).hidden);

function step(id, by, isWanted = () => true) {
  const shown = visible();
  for (let at = shown.indexOf(id) + by; at >= 0 && at < shown.length; at += by) if (isWanted(shown[at])) return shown[at];
  return null;
}

function go(id, inField) {
  if (id === null) return false;
  const target = inField ? $(".name", rows.get(id)) : rows.get(id);
  rows.get(id).scrollIntoView({ block: "nearest" });
  target.focus({ preventScroll: true });
  if (inField) target.select();
  return true;
}

const isOpen = (id) => stateOf(id) === "open";

function goOn(id, inField) {
  if (!go(step(id, 1, isOpen), inField) && !order.some(isOpen)) say("Every class is named, merged or noise: save names.yaml");
}

function commit(input) {
  const id = idOf(input);
  const isMerged = entry(id).merge !== undefined, text = tidy(input.value);
  if (isMerged && fold(text) === fold(nameOf(id))) return true;
  const isGood = isMerged && !text ? forget(id) : setName(id, text);
  input.classList.toggle("bad", isGood === false);
  if (isGood === false) input.setAttribute("aria-invalid", "true");
  else input.removeAttribute("aria-invalid");
  return isGood !== false;
}

function typing(event, input) {
  const id = idOf(input);
  if (event.key === "Escape") { commit(input); go(id, false); }
  else if (event.key === "Enter" && commit(input)) event.shiftKey ? go(step(id, -1), true) : goOn(id, true);
  else return;
  event.preventDefault();
}

const onRow = {
  ArrowDown: (id) => go(step(id, 1), false),
  ArrowUp: (id) => go(step(id, -1), false), k: (id) => go(step(id, -1), false),
  Enter: (id) => go(id, true), n: (id) => go(id, true),
  x: (id) => toggleNoise(id) && entry(id).noise && goOn(id, false),
  s: (id) => toggleStuff(id),
  m: (id) => askMerge(id),
  Backspace: (id) => forget(id),
};
const anywhere = { j: (id) => go(step(id, 1), false), g: (id) => goOn(id, false), u: undo, "/": () => $("#find").focus(), w: save, "?": () => $("#help").showModal() };

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("dialog[open]")) return;
  if (event.target.matches(".name")) return typing(event, event.target);
  if (event.target.matches("input, select")) return;
  if (event.target.matches("button, a") && event.key === "Enter") return;
  const id = idOf(event.target), near = /^[1-9]$/.test(event.key) && id !== null && $(".near li:nth-child(" + event.key + ")", rows.get(id));
  const act = near ? () => merge(id, Number(near.dataset.id)) && goOn(id, false) : (id !== null && onRow[event.key]) || anywhere[event.key];
  if (act) { event.preventDefault(); act(id); }
}

function goFound() {
  const text = $("#find").value, shown = visible();
  const found = shown.find((id) => [ownName(id), nameOf(id)].map(fold).includes(fold(tidy(text))));
  $("#find").value = "";
  filter();
  go(found ?? shown[0] ?? null, false);
}

// Merging with any class.

function askMerge(id) {
  const box = $("#merging");
  box.dataset.id = id;
  $("#merging-title").textContent = "Merge " + title(id);
  $("#targets").replaceChildren(...order.filter((one) => one !== id && root(one) === one && !entry(one).noise).map((one) => new Option("", title(one))));
  $("#target").value = $(".fault", box).textContent = "";
  box.showModal();
}

function find(text) {
  const wanted = fold(tidy(text)), free = order.filter((id) => root(id) === id);
  return free.find((id) => [title(id), nameOf(id)].map(fold).includes(wanted)) || order.find((id) => fold(ownName(id)) === wanted || (!isStuffClass(id) && String(id) === wanted));
}

function answered(event) {
  event.preventDefault();
  const box = $("#merging"), id = Number(box.dataset.id), target = find($("#target").value);
  if (!target) { $(".fault", box).textContent = "There is no class of that name or number."; return; }
  if (!merge(id, target)) { $(".fault", box).textContent = $("#said").textContent; return; }
  box.close();
  goOn(id, false);
}

document.addEventListener("keydown", pressed);
document.addEventListener("mouseover", (event) => { if (event.target.matches(".kinds img")) event.target.title = event.target.alt; });
document.addEventListener("change", (event) => event.target.matches(".name") && commit(event.target));
document.addEventListener("click", (event) => {
  const button = event.target.closest(".row button"), id = idOf(button);
  if (!button) return;
  if (button.matches(".stuff")) toggleStuff(id);
  else if (button.matches(".noise")) toggleNoise(id);
  else if (button.matches(".merge")) askMerge(id);
  else merge(id, Number(button.closest("li").dataset.id));
});
$("#merging form").addEventListener("submit", answered);
$("#merging .cancel").addEventListener("click", () => $("#merging").close());
$("#show").addEventListener("change", filter);
$("#find").addEventListener("input", filter);
$("#find").addEventListener("keydown", (event) => (event.key === "Enter" || event.key === "Escape") && goFound());
$("#undo").addEventListener("click", undo);
$("#keys").addEventListener("click", () => $("#help").showModal());
$("#open").addEventListener("click", () => $("#file").click());
$("#file").addEventListener("change", async (event) => { if (event.target.files[0]) await open(event.target.files[0]); event.target.value = ""; });
$("#save").addEventListener("click", save);
addEventListener("pagehide", () => document.activeElement.matches(".name") && commit(document.activeElement));
addEventListener("storage", (event) => { if (event.key === place) { said = new Map(); recall(); render(); } });
recall();
render();
