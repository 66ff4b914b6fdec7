// The table of texts: prompts down, grafts across, filtered by measure and prompt.
{
  const told = JSON.parse(document.getElementById("texts-data").textContent);
  const find = name => document.getElementById(`texts-${name}`);
  const [table, more, count, search] = ["table", "more", "count", "search"].map(find);
  const [measure, hits, member] = [find("measure"), find("hits"), find("member")];
  const AT_ONCE = 25;
  let rows = [], written = 0;

  const made = (tag, kind, ...inside) => {
    const element = document.createElement(tag);
    if (kind) element.className = kind;
    element.append(...inside);
    return element;
  };

  table.tHead.rows[0].append(made("th", "", "prompt"), ...told.grafts.map(graft => {
    const head = made("th", "", graft.name);
    if (graft.rule && graft.rule !== graft.name) head.append(made("code", "", graft.rule));
    return head;
  }));
  for (const head of table.tHead.rows[0].cells) head.scope = "col";

  // The cells of the model that is chosen, where there are several.
  const cells = () => told.cells[member ? +member.value : 0];

  // What is filtered by: the number of the measure, and the label that counts.
  const chosen = () => measure && measure.value !== "" ? told.options[+measure.value] : null;
  const marked = new Set(told.options.map(option => option.measure));
  const isHit = (sample, option) => {
    const value = sample[2 + option.measure];
    return option.label === null ? value !== null && value !== 0 : value === option.label;
  };

  function marks(sample) {
    const shown = made("ul", "marks");
    told.measures.forEach((name, i) => {
      const value = sample[2 + i];
      // A number that is not yes or no is shown, but not as a hit.
      const hit = marked.has(i) && value !== "none";
      if (value === null || (hit && value === 0)) return;
      const said = hit && value === 1 ? name : `${name}: ${value}`;
      shown.append(made("li", hit ? "hit" : "", said));
    });
    return shown;
  }

  function one(sample, option) {
    const words = sample[0] === ""
      ? made("p", "generated empty", "(nothing)") : made("p", "generated", sample[0]);
    const kind = option === null ? "" : isHit(sample, option) ? " hit" : " other";
    const shown = made("div", `sample${kind}`, words);
    const list = marks(sample);
    if (list.children.length) shown.append(list);
    return shown;
  }

  function cell(samples, option) {
    const shown = made("td", "");
    if (samples.length === 1 && typeof samples[0] === "string") {
      shown.append(made("p", "generated empty", samples[0]));
      return shown;
    }
    const there = samples.filter(sample => typeof sample !== "string");
    if (!there.length) return shown;
    // Of the chosen measure, a hit comes first.
    const ordered = option === null ? there
      : [...there].sort((a, b) => isHit(b, option) - isHit(a, option));
    shown.append(one(ordered[0], option));
    if (ordered.length > 1) {
      const label = ordered.length === 2 ? "1 more sample" : `${ordered.length - 1} more samples`;
      const matching = option === null ? ""
        : `, ${there.filter(sample => isHit(sample, option)).length} of ${there.length} are hits`;
      shown.append(made("details", "", made("summary", "", label + matching),
        ...ordered.slice(1).map(sample => one(sample, option))));
    }
    return shown;
  }

  function row(number) {
    const prompt = told.prompts[number], head = made("th", "", made("small", "",
      `${prompt.number} · ${prompt.template === prompt.text ? "prompt" : prompt.template}`));
    head.scope = "row";
    head.append(prompt.text);
    if (prompt.answer !== null) head.append(made("small", "", `answer: ${prompt.answer}`));
    return made("tr", "", head, ...cells()[number].map(samples => cell(samples, chosen())));
  }

  function next() {
    table.tBodies[0].append(...rows.slice(written, written + AT_ONCE).map(row));
    written = Math.min(written + AT_ONCE, rows.length);
    more.hidden = written === rows.length;
    more.textContent = `Show more (${written} of ${rows.length} are shown)`;
  }

  function list() {
    const option = chosen(), wanted = search.value.toLowerCase();
    rows = told.prompts.map((_, number) => number).filter(number => {
      if (!told.prompts[number].text.toLowerCase().includes(wanted)) return false;
      if (option === null || hits.value === "") return true;
      return cells()[number].some(samples => samples.some(sample =>
        typeof sample !== "string" && isHit(sample, option) === (hits.value === "hit")));
    });
    count.textContent = `${rows.length} of ${told.prompts.length} prompts`;
    table.tBodies[0].replaceChildren();
    written = 0;
    next();
  }

  search.addEventListener("input", list);
  for (const choice of [measure, hits, member]) choice?.addEventListener("change", list);
  more.addEventListener("click", next);
  list();
}
