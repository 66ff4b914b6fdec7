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
  const outlines = {"error_y.color": look.text, "marker.line.color": look.text,
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
