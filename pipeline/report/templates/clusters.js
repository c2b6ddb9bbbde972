// What is seen of the classes and of what is said of them (names.js), and the keys.
"use strict";

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
