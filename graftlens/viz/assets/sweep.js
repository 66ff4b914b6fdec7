// Shows the prompts of a graft whose bar or cell is clicked. Global before it: `charts`, of page.js.
const held = JSON.parse(document.getElementById("behind-data").textContent);
const place = new Map(held.grafts.map((graft, i) => [graft.name, i]));
const field = document.getElementById("graft-name");
const order = document.getElementById("graft-order");
const more = document.getElementById("graft-more");
const body = document.querySelector("#behind tbody");
const AT_ONCE = 50;
let shown = -1, rows = [], written = 0;

document.getElementById("graft-names").append(...held.grafts.map(graft => {
  const option = document.createElement("option");
  option.value = graft.name;
  return option;
}));

function made(tag, kind, ...inside) {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  element.append(...inside);
  return element;
}

// A word as a shell reads it.
function quoted(word) {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : "'" + word.replaceAll("'", "'\"'\"'") + "'";
}

function command(graft, prompt) {
  const words = [...held.command, "--number", String(prompt)];
  if (!graft.end) words.push("--graft", graft.name);
  return words.map(quoted).join(" ");
}

function commands(line) {
  const code = made("code", "", line);
  const copy = made("button", "", "copy");
  copy.type = "button";
  copy.addEventListener("click", () => {
    getSelection().selectAllChildren(code);
    navigator.clipboard?.writeText(line).then(() => { copy.textContent = "copied"; }, () => {});
  });
  return made("details", "", made("summary", "", "its command"), code, copy);
}

function percent(share) {
  const said = 100 * share;
  return (said >= 0.1 || said === 0 ? said.toFixed(1) : said.toPrecision(1)) + "%";
}

function row(number) {
  const graft = held.grafts[shown], prompt = held.prompts[number];
  const cell = held.cells[shown][number];
  const line = made("tr", "", made("th", "", String(prompt.number)));
  line.firstChild.scope = "row";
  const middle = [made("td", "text", prompt.text), made("td", "text", prompt.answer)];
  if (held.templates.length > 1) middle.unshift(made("td", "words", held.templates[prompt.template]));
  line.append(...middle);
  if (!Array.isArray(cell)) {
    const why = made("td", "text", cell === null ? "not run" : held.reasons[cell]);
    why.colSpan = 3;
    line.append(why);
  } else {
    const [rank, prob, ...likeliest] = cell;
    const guesses = made("ol", "guesses");
    for (let i = 0; i < likeliest.length; i += 2) {
      const [token, right] = [held.tokens[likeliest[i]], likeliest[i] === prompt.target];
      guesses.append(made("li", right ? "right" : "", made("span", "token", token),
        ` ${percent(likeliest[i + 1])}${right ? " ✓" : ""}`));
    }
    const ranked = made("td", "count", rank <= 5 ? made("strong", "", String(rank)) : String(rank));
    line.append(ranked, made("td", "count", percent(prob)), made("td", "text", guesses));
  }
  line.append(made("td", "text commands", commands(command(graft, prompt.number))));
  return line;
}

function next() {
  body.append(...rows.slice(written, written + AT_ONCE).map(row));
  written = Math.min(written + AT_ONCE, rows.length);
  more.hidden = written === rows.length;
  more.textContent = `Show more (${written} of ${rows.length} are shown)`;
}

// Where a prompt comes in the chosen order; those that were not run come last.
const of = (number, key) => {
  const cell = held.cells[shown][number];
  return Array.isArray(cell) ? key(cell) : Infinity;
};
const keys = {best: ([rank]) => rank, worst: ([rank]) => -rank, likely: ([, prob]) => -prob};

function list() {
  rows = held.prompts.map((_, number) => number);
  const key = keys[order.value];
  if (key) rows.sort((a, b) => {
    const [one, other] = [of(a, key), of(b, key)];
    return one === other ? a - b : one - other;
  });
  body.replaceChildren();
  written = 0;
  next();
}

function choose(name) {
  if (!place.has(name)) return false;
  shown = place.get(name);
  const graft = held.grafts[shown];
  field.value = name;
  document.getElementById("graft-shown").textContent = name;
  document.getElementById("graft-rule").textContent = graft.rule || "(no rule: the base)";
  document.getElementById("graft-numbers").replaceChildren(
    ...graft.numbers.map(said => made("li", "", said)));
  list();
  return true;
}

// The graft of a bar or a cell.
const grafted = (trace, number) => [number].flat().reduce((inner, i) => inner?.[i], trace.meta);

function clicked(event) {
  const point = event.points.find(one => one.data.meta);
  if (point && choose(grafted(point.data, point.pointNumber))) goTo("graft");
}

for (const chart of charts) {
  const listen = () => {
    chart.on("plotly_click", clicked);
    if (chart.data.some(trace => trace.meta))
      byKeys(chart, (trace, number) => place.has(grafted(trace, number)));
  };
  if (chart.on) listen();
  else chart.addEventListener("drawn", listen, {once: true});
}
field.addEventListener("change", () => {
  if (!choose(field.value)) field.setCustomValidity("No graft of this page has that name.");
  else field.setCustomValidity("");
  field.reportValidity();
});
order.addEventListener("change", list);
more.addEventListener("click", next);
document.querySelectorAll("[data-graft]").forEach(button =>
  button.addEventListener("click", () => { if (choose(button.dataset.graft)) goTo("graft"); }));
choose(held.first);
