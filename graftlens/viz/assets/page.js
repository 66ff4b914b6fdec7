// Draws the charts of a page in its reader's colours. Global before it: Plotly, and `looks`, the
// colours (graftlens.viz.theme.Theme) of a light and a dark page.
const wantsDark = window.matchMedia("(prefers-color-scheme: dark)");
const charts = [...document.querySelectorAll(".chart")];
const drawn = new Set();
const settings = {responsive: true, displaylogo: false, showSendToCloud: false,
  displayModeBar: window.innerWidth > 640 ? "hover" : false,
  plotlyServerURL: "", modeBarButtonsToRemove: ["sendChartToCloud", "select2d", "lasso2d"]};
function dress(chart, printing) {
  const look = looks[wantsDark.matches && !printing ? "dark" : "light"];
  const layout = {"font.color": look.text, "modebar.color": look.muted,
    "modebar.activecolor": look.text};
  for (const axis of Object.keys(chart.layout).filter(key => /^[xy]axis/.test(key))) {
    layout[axis + ".gridcolor"] = look.grid;
    layout[axis + ".linecolor"] = layout[axis + ".zerolinecolor"] = look.muted;
  }
  const bars = chart.data.map((trace, i) => trace.type === "bar" ? i : -1).filter(i => i >= 0);
  const outlines = {"error_x.color": look.text, "error_y.color": look.text,
    "marker.line.color": look.text,
    "marker.opacity": look.bar_opacity,
    // A hatch that replaces the fill has the bar's colour, one over it that of the page.
    "marker.pattern.fgcolor": bars.map(i => chart.data[i].marker.pattern?.fillmode === "replace"
      ? chart.data[i].marker.color : look.surface)};
  const empty = chart.data.map((trace, i) => trace.name === "no value" ? i : -1)
    .filter(i => i >= 0);
  if (empty.length) return Plotly.update(chart, {"marker.line.color": look.muted}, layout, empty);
  return bars.length ? Plotly.update(chart, outlines, layout, bars)
                     : Plotly.relayout(chart, layout);
}
function draw(chart) {
  if (drawn.has(chart)) return;
  drawn.add(chart);
  const figure = JSON.parse(document.getElementById(chart.id + "-figure").textContent);
  Plotly.newPlot(chart, figure.data, figure.layout, settings).then(() => dress(chart, false));
  chart.dispatchEvent(new Event("drawn"));
}
// One chart a turn, so that a page of many can be read and scrolled at once.
function drawNext() {
  const next = charts.find(chart => !drawn.has(chart));
  if (next) { draw(next); setTimeout(drawNext); }
}
drawNext();
wantsDark.addEventListener("change", () => drawn.forEach(chart => dress(chart, false)));
// What a click on a cell or bar of a chart opens, keys open, too: arrows choose one, Enter or Space
// opens it. `opens(trace, number)`: whether a point of a trace is one of them.
function byKeys(chart, opens = () => true) {
  let chosen = 0;
  const named = chart.getAttribute("aria-label");
  chart.tabIndex = 0;
  chart.setAttribute("role", "application");
  chart.setAttribute("aria-label", `${named} Arrow keys choose a cell or bar, Enter opens it.`);
  const targets = () => chart._fullData.flatMap((full, curveNumber) => {
    if (full.visible !== true) return [];
    const numbers = full.type !== "heatmap" ? Array.from(full.x, (_, i) => i)
      : Array.from(full.z).flatMap((row, r) => Array.from(row, (_, c) => [r, c]));
    return numbers.filter(number => opens(chart.data[curveNumber], number))
      .map(pointNumber => ({full, curveNumber, pointNumber}));
  });
  const show = () => {
    const at = targets()[chosen];
    if (!at) return;
    const {type, x, y, xaxis, yaxis} = at.full, [row, column] = [at.pointNumber].flat();
    const axis = name => chart._fullLayout[name.replace(/^[xy]/, "$&axis")];
    // A cell is found by where it is; plotly finds bars alone by their number.
    Plotly.Fx.hover(chart, type !== "heatmap" ? [at]
      : {xpx: axis(xaxis).d2p(x[column]), ypx: axis(yaxis).d2p(y[row])}, xaxis + yaxis);
  };
  // The next one of the same column, or the same one where there is none.
  const above = (all, {full, curveNumber, pointNumber: [row, column]}, up) => {
    const [low, high] = chart._fullLayout[full.yaxis.replace("y", "yaxis")].range;
    const away = ({pointNumber: [r]}) => (r - row) * (low < high ? up : -up);
    const next = all.filter(one => one.curveNumber === curveNumber &&
      one.pointNumber[1] === column && away(one) > 0).sort((a, b) => away(a) - away(b))[0];
    return next ? all.indexOf(next) : chosen;
  };
  chart.addEventListener("keydown", event => {
    const all = targets(), at = all[chosen], to = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    const up = {ArrowUp: 1, ArrowDown: -1}[event.key];
    if (event.target !== chart || !at) return;
    if (event.key === "Enter" || event.key === " ") {
      const [row, column] = [at.pointNumber].flat();
      chart.emit("plotly_click", {points: [{data: chart.data[at.curveNumber], ...at,
        x: at.full.x[column ?? row], y: at.full.y[row]}]});
    } else if (to || (up && at.full.type !== "heatmap")) {
      chosen = (chosen + (to ?? -up) + all.length) % all.length;
    } else if (up) {
      chosen = above(all, at, up);
    } else return;
    event.preventDefault();
    show();
  });
  chart.addEventListener("focus", show);
  chart.addEventListener("blur", () => Plotly.Fx.unhover(chart));
}
// Shows a section that something was opened in, and reads on from there.
function goTo(id) {
  const head = document.getElementById(id);
  head.tabIndex = -1;
  head.focus({preventScroll: true});
  head.scrollIntoView({block: "start"});
}
// A frame that has more than it shows is marked.
const frames = [...document.querySelectorAll(".scroll")];
const marking = new ResizeObserver(() => requestAnimationFrame(() => frames.forEach(frame =>
  frame.classList.toggle("wide", frame.scrollWidth > frame.clientWidth + 1))));
frames.forEach(frame => [frame, ...frame.children].forEach(part => marking.observe(part)));

// On paper charts are as wide as the sheet, and what is wider than it shrinks.
const root = document.documentElement;
window.addEventListener("beforeprint", () => {
  root.classList.add("printing");
  charts.forEach(draw);
  for (const chart of drawn) {
    Plotly.relayout(chart, {width: chart.parentElement.clientWidth});
    dress(chart, true);
  }
  for (const frame of frames) for (const inner of frame.children)
    inner.style.zoom = Math.min(1, frame.clientWidth / Math.max(1, inner.scrollWidth));
});
window.addEventListener("afterprint", () => {
  root.classList.remove("printing");
  frames.forEach(frame => [...frame.children].forEach(inner => { inner.style.zoom = ""; }));
  for (const chart of drawn) {
    dress(chart, false);
    Plotly.relayout(chart, {width: null, autosize: true});
  }
});
