// Shows one of the heat maps of the sites at a time. Globals before it: Plotly, `draw` and `drawn`
// (page.js).
const views = [...document.querySelectorAll("[data-view]")];
const chosenView = document.getElementById("sites-view");
function showView() {
  for (const view of views) {
    view.hidden = view.dataset.view !== chosenView.value;
    if (view.hidden) continue;
    for (const chart of view.querySelectorAll(".chart")) {
      // One that was drawn while it was hidden has no width yet.
      if (drawn.has(chart)) Plotly.Plots.resize(chart);
      else draw(chart);
    }
  }
}
chosenView.addEventListener("change", showView);
showView();
