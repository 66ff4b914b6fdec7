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
          share >= 1 ? name : `${name} in ${number(100 * share, 3)}% of its layers and heads`).join(", ");
      }
      row.append(cell);
    }
    return row;
  });
  at("grid").replaceChildren(made("thead", {}, head), made("tbody", {}, ...rows));
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
  if (room >= 3) Object.assign(trace, {texttemplate: "%{text}", textfont: {size: 11},
    text: of.top.map(row => row.map(words => clean(short(lens.words[words[0]], room))))});
  const plain = {showgrid: false, zeroline: false, automargin: true, ticks: ""};
  const layout = {paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {family: "system-ui, sans-serif", size: 12}, showlegend: false,
    margin: {l: 20, r: 20, t: 6, b: 20},
    hoverlabel: {align: "left"},
    xaxis: {...plain, tickvals: trace.x, ticktext: tokens.map(t => clean(short(t, 14))),
      tickangle: -60, range: [-.5, n - .5]},
    yaxis: {...plain, side: wide ? "right" : "left", tickvals: trace.y, ticktext: lens.layers,
      range: [-.5, lens.layers.length - .5], title: {text: "layers that have run", standoff: 10}}};
  Plotly.react(place, [trace], layout, {...settings, displayModeBar: false}).then(() => {
    drawn.add(place);
    dress(place, false);
    // The last token, where the answer would come, is what one looks at first.
    if (!lensSeen) scroll.scrollLeft = scroll.scrollWidth;
    lensSeen = true;
    done(place);
  });
}

// --- attention ---
const unpacked = new Map();
function pattern(run) {
  if (!unpacked.has(run)) {
    const text = atob(at("pattern-" + run).textContent), bytes = new Uint8Array(text.length);
    for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
    const view = new DataView(bytes.buffer), values = new Float32Array(bytes.length / 2);
    for (let i = 0; i < values.length; i++) values[i] = view.getUint16(2 * i, true) / data.full;
    unpacked.set(run, values);
  }
  return unpacked.get(run);
}
const apart = new Map();
function farthest(a, b) {
  const key = Math.min(a, b) + " " + Math.max(a, b);
  if (!apart.has(key)) {
    const p = pattern(a), q = pattern(b);
    let most = 0;
    for (let i = 0; i < p.length; i++) most = Math.max(most, Math.abs(p[i] - q[i]));
    apart.set(key, most || 1);
  }
  return apart.get(key);
}
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
function head(view, h) {
  const start = (layer * data.heads + h) * cells;
  const p = pattern(view.a), q = view.b === null ? null : pattern(view.b);
  return (query, key) => {
    const i = start + query * (query + 1) / 2 + key;
    return q ? p[i] - q[i] : p[i];
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
      for (let query = 0; query < n; query++) for (let key = 0; key <= query; key++) {
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
    panel.root.querySelector(".shown-name").textContent = title;
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

const tasks = [drawTokens, drawLens, drawAttention, drawGrid];
function drawNextView() {
  const task = tasks.shift();
  if (task) { task(); setTimeout(drawNextView); }
}
setTimeout(drawNextView);
const on = (id, act) => at(id).addEventListener("change", act);
for (const id of ["tokens-run", "tokens-measure"]) on(id, drawTokens);
for (const id of ["lens-run", "lens-value"]) on(id, drawLens);
for (const id of ["left-a", "left-b", "right-a", "right-b"]) on(id, drawAttention);
on("grid-run", drawGrid);
on("layer", () => { layer = +at("layer").value; drawAttention(); });
at("layer-back").addEventListener("click", () => { layer -= 1; drawAttention(); });
at("layer-on").addEventListener("click", () => { layer += 1; drawAttention(); });
let resizing;
addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(drawLens, 200); });
addEventListener("beforeprint", () => dress(at("lens-shown"), true));
addEventListener("afterprint", () => dress(at("lens-shown"), false));
})();
