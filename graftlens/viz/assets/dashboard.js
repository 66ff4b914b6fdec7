// The views of a dashboard. Global before it: Plotly, page.js, CircuitsVis and `circuits`. It reads
// the data in #dashboard-data and the attention patterns in #pattern-0, #pattern-1, …
(() => {
const at = id => document.getElementById(id);
const data = JSON.parse(at("dashboard-data").textContent);
const {tokens, runs, lens, colors} = data;
const n = tokens.length, cells = n * (n + 1) / 2;

function made(tag, props = {}, ...inner) {
  const element = Object.assign(document.createElement(tag), props);
  element.append(...inner);
  return element;
}
// Text that plotly shows as it is, as graftlens.viz.spelling.escaped spells it.
const clean = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;")
  .replace(/\$/g, "&#36;");
// A token that stands alone needs no marks of direction.
function short(text, most) {
  const bare = [...text.replace(/[\u2066\u2069]/g, "")];
  return bare.length > most ? bare.slice(0, most - 1).join("") + "…" : bare.join("");
}
function number(value, digits = 4) {
  if (value === null || Number.isNaN(value)) return "–";
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(1).replaceAll("-", "−");
  return String(+value.toPrecision(digits)).replace("-", "−");
}
// A gradient with what its ends (and its middle) stand for.
function scale(place, title, stops, labels) {
  const bar = made("div", {className: "bar"});
  bar.style.background = `linear-gradient(to right in lab, ${stops.join(", ")})`;
  const ends = labels.map(label => made("span", {textContent: label}));
  place.replaceChildren(made("div", {className: "scale"}, made("div", {textContent: title}), bar,
    made("div", {className: "ends"}, ...ends)));
}
const done = place => place.removeAttribute("aria-busy");

// --- which components are grafted at each position ---
function drawGrid() {
  const shares = data.shares[at("grid-run").value];
  const head = made("tr", {}, made("th", {scope: "col", textContent: "component"}),
    ...tokens.map((token, i) => made("th", {scope: "col", title: `position ${i}`},
      made("span", {textContent: short(token, 14)}))));
  const rows = data.components.map((component, c) => {
    const row = made("tr", {}, made("th", {scope: "row", textContent: component}));
    for (let i = 0; i < n; i++) {
      const here = data.sources.map((source, s) => ({...source, mark: s + 1,
        share: shares[s] ? shares[s][c][i] : 0})).filter(source => source.share > 0);
      const cell = made("td");
      if (here.length) {
        let low = 0;
        const stops = here.map(({color, share}) => {
          const from = low;
          low += 100 * share;
          return `color-mix(in srgb, ${color} 45%, transparent) ${from}% ${low}%`;
        });
        cell.style.backgroundImage =
          `linear-gradient(to top, ${stops.join(", ")}, transparent ${low}%)`;
        for (const {share, mark} of here) {
          cell.append(share >= 1 ? "●" : share < .01 ? "<1"
            : String(Math.min(99, Math.round(100 * share))));
          if (data.sources.length > 1) cell.append(made("sup", {textContent: mark}));
        }
        cell.title = `${component} at position ${i}: ` + here.map(({name, share}) =>
          share >= 1 ? name : `${name} in ${number(100 * share, 3)}% of its layers and heads`
        ).join(", ");
      }
      row.append(cell);
    }
    return row;
  });
  at("grid").replaceChildren(made("thead", {}, head), made("tbody", {}, ...rows));
  // It opens at its grafted end.
  const last = Math.max(...rows.map(row => [...row.cells].findLastIndex(cell => cell.title)));
  const frame = at("grid").parentElement, end = rows[0].cells[Math.max(last, 0)];
  frame.scrollLeft = last < 1 ? 0 : end.offsetLeft + end.offsetWidth - frame.clientWidth + 16;
  done(at("grid"));
}

// --- tokens by a measure ---
// CircuitsVis puts a token into the page as HTML. A word joiner, which has no width, keeps "<" and
// "&" from beginning a tag or an entity there, and its tooltip shows the text as it is.
const inert = token => token.replace(/[<&]/g, "$&\u2060");
function drawTokens() {
  const run = at("tokens-run").value, name = at("tokens-measure").value;
  const {title, unit, note, low, high} = data.measures[name], values = data.values[name][run];
  at("tokens-note").textContent = values ? note
    : `This was not computed for ${runs[run]}; choose another run or measure.`;
  const stops = [low < 0 ? colors.negative : null, "white", high > 0 ? colors.positive : null]
    .filter(Boolean);
  const ends = [low < 0 ? number(low, 3) : null, "0", high > 0 ? number(high, 3) : null]
    .filter(Boolean);
  scale(at("tokens-legend"), `${title} (${unit}), one scale for all runs`, stops, ends);
  circuits(at("tokens-shown"), CircuitsVis.ColoredTokens, {
    tokens: tokens.map(inert), values: values || tokens.map(() => null),
    minValue: low || -1, maxValue: high || 1,
    negativeColor: colors.negative, positiveColor: colors.positive, paddingBottom: 0,
  });
  const head = made("tr", {}, made("th", {scope: "col", textContent: "position"}),
    made("th", {scope: "col", textContent: "token", className: "words"}),
    made("th", {scope: "col", textContent: `${title} (${unit})`}));
  at("tokens-table").replaceChildren(made("thead", {}, head), made("tbody", {},
    ...tokens.map((textContent, i) => made("tr", {}, made("th", {scope: "row", textContent: i}),
      made("td", {textContent, className: "words"}),
      made("td", {textContent: number(values ? values[i] : null)})))));
}

// --- logit lens ---
function lensValues(run, kind) {
  const of = lens.runs[run];
  if (kind === "top_prob") return of.top_probs.map(row => row.map(probs => probs[0]));
  if (kind === "rank") return of.rank.map(row => row.map(v => v === null ? null : Math.log10(v)));
  if (!kind.startsWith("diff")) return of[kind];
  const other = lens.runs[kind === "diff_base" ? 0 : 1].logprob;
  return of.logprob.map((row, l) => row.map((v, i) =>
    v === null || other[l][i] === null ? null : v - other[l][i]));
}
function lensHover(run, l, i, kind, value) {
  const of = lens.runs[run], rank = of.rank[l][i];
  const lines = [`position ${i} <b>${clean(tokens[i])}</b>, ${clean(lens.reached[l])}`];
  if (rank !== null) lines.push(`answer: rank ${rank}, probability ${number(of.prob[l][i])}, ` +
    `log-probability ${number(of.logprob[l][i])}`);
  lines.push(`KL to PRE ${number(of.kl_base[l][i])}, to SFT ${number(of.kl_full[l][i])} nats`);
  if (kind.startsWith("diff")) lines.push(`difference ${number(value)} nats`);
  of.top[l][i].forEach((word, k) => lines.push(
    `${k + 1}. <b>${clean(lens.words[word])}</b> ${number(of.top_probs[l][i][k])}`));
  return lines.join("<br>");
}
// Labels of a heat map, each in black or white, whichever stands out more from its cell (a contrast
// of 4.5 or more, as graftlens.viz.theme.ink has it); plotly's own are grey or white.
const channels = hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16));
function ink(stops, share) {
  const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(at), stops.length - 2);
  const [from, to] = [channels(stops[low]), channels(stops[low + 1])];
  const [r, g, b] = from.map((c, i) => {
    const part = Math.round(c + (to[i] - c) * (at - low)) / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  const light = 0.2126 * r + 0.7152 * g + 0.0722 * b;
  return (light + 0.05) / 0.05 >= 1.05 / (light + 0.05) ? "#000000" : "#ffffff";
}
function written(z, {zmin, zmax}, stops, label) {
  const found = new Map();
  z.forEach((row, l) => row.forEach((v, i) => {
    const said = v === null ? "" : label(l, i);
    if (!said) return;
    const color = ink(stops, (v - zmin) / (zmax - zmin));
    if (!found.has(color)) found.set(color, {type: "scatter", mode: "text", x: [], y: [], text: [],
      textfont: {color, size: 11}, hoverinfo: "skip", showlegend: false});
    const trace = found.get(color);
    trace.x.push(i);
    trace.y.push(l);
    trace.text.push(said);
  }));
  return [...found.values()];
}
let lensSeen = false;
function drawLens() {
  const run = +at("lens-run").value, name = at("lens-value").value;
  const kind = lens.kinds[name], z = lensValues(run, name), scroll = at("lens-scroll");
  const stops = kind.kind === "diverging" ? colors.diverging : colors.sequential;
  const shown = kind.kind === "rank" ? [...stops].reverse() : stops;
  const ends = kind.kind === "rank" ? ["1", number(10 ** kind.high)]
    : kind.kind === "diverging" ? [number(kind.low, 3), "0", number(kind.high, 3)]
    : [number(kind.low, 3), number(kind.high, 3)];
  if (kind.beyond) ends[0] = "\u2264 " + ends[0];
  if (kind.beyond && kind.kind === "diverging") ends[2] = "\u2265 " + ends[2];
  scale(at("lens-legend"), kind.title, shown, ends);
  const width = Math.max(scroll.clientWidth, 130 + 22 * n), cell = (width - 130) / n;
  const wide = width > scroll.clientWidth, place = at("lens-shown");
  const room = Math.floor((cell - 6) / 7);
  place.style.width = width + "px";
  place.style.height = 130 + 24 * lens.layers.length + "px";
  const of = lens.runs[run];
  const trace = {type: "heatmap", z, x: tokens.map((_, i) => i),
    y: lens.layers.map((_, l) => l), zmin: kind.low,
    zmax: kind.high > kind.low ? kind.high : kind.low + 1,
    colorscale: shown.map((color, i) => [i / (shown.length - 1), color]), showscale: false,
    xgap: 1, ygap: 1, hoverinfo: "text",
    hovertext: z.map((row, l) => row.map((v, i) => lensHover(run, l, i, name, v)))};
  const labels = room < 3 ? [] : written(z, trace, shown,
    (l, i) => clean(short(lens.words[of.top[l][i][0]], room)));
  const plain = {showgrid: false, zeroline: false, automargin: true, ticks: ""};
  const layout = {paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {family: "system-ui, sans-serif", size: 12}, showlegend: false,
    margin: {l: 20, r: 20, t: 6, b: 20},
    hoverlabel: {align: "left"},
    xaxis: {...plain, tickvals: trace.x, ticktext: tokens.map(t => clean(short(t, 14))),
      tickangle: -60, range: [-.5, n - .5]},
    yaxis: {...plain, side: wide ? "right" : "left", tickvals: trace.y, ticktext: lens.layers,
      range: [-.5, lens.layers.length - .5], title: {text: "layers that have run", standoff: 10}}};
  Plotly.react(place, [trace, ...labels], layout, {...settings, displayModeBar: false}).then(() => {
    drawn.add(place);
    dress(place, false);
    // The last token, where the answer would come, is what one looks at first.
    if (!lensSeen) scroll.scrollLeft = scroll.scrollWidth;
    lensSeen = true;
    done(place);
  });
}

// --- attention ---
const {bits, full, places, apart} = data.attention;
const sets = []; // of each run, when all are there, its attention: [kept head, query and key]
async function unpacked(run) {
  const bytes = Uint8Array.from(atob(at("pattern-" + run).textContent), c => c.charCodeAt(0));
  if (bits === 8) {
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }
  const view = new DataView(bytes.buffer), values = new Uint16Array(bytes.length / 2);
  for (let i = 0; i < values.length; i++) values[i] = view.getUint16(2 * i, true);
  return values;
}
const between = (a, b) => apart[Math.min(a, b) + " " + Math.max(a, b)];
const farthest = (a, b) => a === b ? 1 : between(a, b).most || 1;
// 256 colours from white to a colour, mixed as CircuitsVis mixes them.
const shades = new Map();
function shade(color) {
  if (!shades.has(color)) {
    const canvas = made("canvas", {width: 256, height: 1}), pen = canvas.getContext("2d");
    for (let i = 0; i < 256; i++) {
      pen.fillStyle = `color-mix(in lab, ${color} ${i / 2.55}%, white)`;
      pen.fillRect(i, 0, 1, 1);
    }
    shades.set(color, pen.getImageData(0, 0, 256, 1).data);
  }
  return shades.get(color);
}
let [layer, locked] = data.start, hovered = null;
const panels = ["left", "right"].map(side => {
  const root = at(side), group = root.querySelector(".heads");
  const heads = Array.from({length: data.heads}, (_, h) => {
    const canvas = made("canvas", {width: n, height: n});
    const button = made("button", {type: "button", className: "head"}, canvas, made("span"));
    button.addEventListener("click", () => { locked = h; hovered = null; drawHead(); });
    button.addEventListener("mouseenter", () => { hovered = h; drawHead(); });
    button.addEventListener("mouseleave", () => { hovered = null; drawHead(); });
    group.append(button);
    return {button, canvas};
  });
  return {side, root, heads, place: at(side + "-pattern"), legend: at(side + "-legend")};
});
function chosen(panel) {
  const a = +at(panel.side + "-a").value, b = at(panel.side + "-b").value;
  return {a, b: b === "" ? null : +b,
    name: b === "" ? runs[a] : `${runs[a]} − ${runs[b]}`};
}
// (query, key) -> attention; null of a head that was left out.
function head(view, h) {
  const start = places[layer][h] * cells;
  if (start < 0) return null;
  const p = sets[view.a], q = view.b === null ? null : sets[view.b];
  return (query, key) => {
    const i = start + query * (query + 1) / 2 + key;
    return (q ? p[i] - q[i] : p[i]) / full;
  };
}
// Differences of both panels share one scale, whatever the layer.
function limit() {
  return Math.max(...panels.map(chosen).filter(v => v.b !== null).map(v => farthest(v.a, v.b)));
}
function drawAttention() {
  at("layer").value = layer;
  at("layer-back").disabled = layer === 0;
  at("layer-on").disabled = layer === at("layer").options.length - 1;
  const most = limit();
  for (const panel of panels) {
    const view = chosen(panel), signed = view.b !== null, top = signed ? most : 1;
    const up = shade(signed ? colors.positive : colors.pattern), down = shade(colors.negative);
    scale(panel.legend, `${view.name}: ${signed ? "difference of " : ""}attention`,
      signed ? [colors.negative, "white", colors.positive] : ["white", colors.pattern],
      signed ? [number(-top, 3), "0", number(top, 3)] : ["0", "1"]);
    panel.heads.forEach(({button, canvas}, h) => {
      const value = head(view, h), pen = canvas.getContext("2d"), image = pen.createImageData(n, n);
      button.title = value ? "" : "left out";
      button.classList.toggle("out", !value);
      for (let query = 0; value && query < n; query++) for (let key = 0; key <= query; key++) {
        const v = value(query, key), from = v < 0 ? down : up, to = 4 * (query * n + key);
        const step = 4 * Math.min(255, Math.round(255 * Math.abs(v) / top));
        for (let c = 0; c < 4; c++) image.data[to + c] = from[step + c];
      }
      pen.putImageData(image, 0, 0);
      button.lastChild.textContent = `L${layer}H${h}`;
    });
  }
  drawHead();
}
function drawHead() {
  const h = hovered ?? locked, most = limit();
  for (const panel of panels) {
    const view = chosen(panel), signed = view.b !== null, top = signed ? most : 1;
    const value = head(view, h), title = `L${layer}H${h}: ${view.name}`;
    panel.heads.forEach(({button}, i) => button.setAttribute("aria-pressed", i === locked));
    panel.root.querySelector(".shown-name").textContent = title + (value ? "" : " (left out)");
    panel.place.hidden = panel.root.querySelector(".most").hidden = !value;
    done(panel.place);
    if (!value) continue;
    circuits(panel.place, CircuitsVis.AttentionPattern, {
      tokens, zoomed: true, minValue: -top, maxValue: top,
      negativeColor: colors.negative, positiveColor: signed ? colors.positive : colors.pattern,
      attention: tokens.map((_, query) => Array.from({length: query + 1},
        (_, key) => +value(query, key).toFixed(4))),
    });
    const last = tokens.map((token, key) => ({token, key, v: value(n - 1, key)}))
      .sort((a, b) => Math.abs(b.v) - Math.abs(a.v)).slice(0, 5);
    panel.root.querySelector(".most").textContent = "Largest at the last token: " + last.map(
      ({token, key, v}) => `${token} (${key}) ${v.toFixed(4).replace("-", "−")}`).join(", ");
  }
}

// Which heads attend differently; a click opens one in both panels.
function drawApart() {
  const a = +at("apart-a").value, b = +at("apart-b").value, place = at("apart-shown");
  const z = a === b ? places.map(row => row.map(() => 0)) : between(a, b)[at("apart-of").value];
  const top = Math.max(...z.flat()) || 1;
  scale(at("apart-legend"), `${runs[a]} and ${runs[b]}: attention that goes elsewhere`,
    colors.sequential, ["0", number(100 * top, 3) + "%"]);
  const trace = {type: "heatmap", z, x: places[0].map((_, h) => h), y: places.map((_, l) => l),
    zmin: 0, zmax: top, showscale: false, xgap: 1, ygap: 1, hoverinfo: "text",
    colorscale: colors.sequential.map((color, i) => [i / (colors.sequential.length - 1), color]),
    hovertext: z.map((row, l) => row.map((v, h) => `L${l}H${h}: ${number(100 * v, 3)}%` +
      (places[l][h] < 0 ? " (its patterns were left out)" : "")))};
  const plain = {showgrid: false, zeroline: false, automargin: true, ticks: ""};
  const layout = {paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {family: "system-ui, sans-serif", size: 12}, showlegend: false,
    margin: {l: 20, r: 20, t: 6, b: 20},
    xaxis: {...plain, title: {text: "head"}, range: [-.5, data.heads - .5],
      dtick: data.heads > 16 ? 4 : 1},
    yaxis: {...plain, title: {text: "layer"}, range: [-.5, places.length - .5],
      dtick: places.length > 16 ? 4 : 1}};
  const wide = Math.min(place.parentElement.clientWidth, 90 + 30 * data.heads);
  place.style.width = Math.max(280, wide) + "px";
  place.style.height = 80 + 15 * Math.max(6, places.length) + "px";
  Plotly.react(place, [trace], layout, {...settings, displayModeBar: false}).then(() => {
    if (!drawn.has(place)) {
      place.on("plotly_click", ({points: [{x, y}]}) => openHead(y, x));
      byKeys(place);
    }
    drawn.add(place);
    dress(place, false);
    done(place);
  });
}
function openHead(l, h) {
  [layer, locked, hovered] = [l, h, null];
  const [a, b] = [at("apart-a").value, at("apart-b").value];
  [at("left-a").value, at("left-b").value] = [a, ""];
  [at("right-a").value, at("right-b").value] = [a, a === b ? "" : b];
  drawAttention();
  goTo("heads");
}

const tasks = [drawTokens, drawLens, drawApart, drawAttention, drawGrid];
function drawNextView() {
  const task = tasks.shift();
  if (task) { task(); setTimeout(drawNextView); }
}
Promise.all(runs.map((_, run) => unpacked(run))).then(found => {
  sets.push(...found);
  drawNextView();
});
const on = (id, act) => at(id).addEventListener("change", act);
for (const id of ["tokens-run", "tokens-measure"]) on(id, drawTokens);
for (const id of ["lens-run", "lens-value"]) on(id, drawLens);
for (const id of ["left-a", "left-b", "right-a", "right-b"]) on(id, drawAttention);
for (const id of ["apart-a", "apart-b", "apart-of"]) on(id, drawApart);
on("grid-run", drawGrid);
on("layer", () => { layer = +at("layer").value; drawAttention(); });
at("layer-back").addEventListener("click", () => { layer -= 1; drawAttention(); });
at("layer-on").addEventListener("click", () => { layer += 1; drawAttention(); });
let resizing;
addEventListener("resize", () => {
  clearTimeout(resizing);
  resizing = setTimeout(() => { drawLens(); drawApart(); }, 200);
});
// On paper the heat maps are as wide as the sheet, which page.js sees to.
addEventListener("beforeprint", () => {
  for (const place of [at("lens-shown"), at("apart-shown")]) {
    place.style.width = place.style.zoom = "";
    Plotly.relayout(place, {width: place.parentElement.clientWidth});
  }
});
addEventListener("afterprint", () => { drawLens(); drawApart(); });
})();
