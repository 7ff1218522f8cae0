"use strict";
// The page says everything without this script; with it one can point at curves, sort tables, and see where a number comes from
// without leaving the table.

const SVG = "http://www.w3.org/2000/svg";

// Values of all visible curves at the step that is pointed at.
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const chart = JSON.parse(svg.dataset.chart);
  const tip = document.createElement("div");
  const cross = document.createElementNS(SVG, "line");
  tip.className = "tip";
  cross.setAttribute("class", "cross");
  cross.setAttribute("y1", 12);
  cross.setAttribute("y2", svg.viewBox.baseVal.height - 34);
  tip.hidden = true;
  svg.after(tip);

  const hide = () => { tip.hidden = true; cross.remove(); };
  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const pixel = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
    const share = Math.min(1, Math.max(0, (pixel - chart.left) / (chart.right - chart.left)));
    const wanted = chart.x[0] + share * (chart.x[1] - chart.x[0]);
    const shown = chart.curves
      .filter((curve) => document.getElementById("g" + curve.group)?.checked !== false)
      .map((curve) => {
        const at = curve.x.reduce((best, x, i) => (Math.abs(x - wanted) < Math.abs(curve.x[best] - wanted) ? i : best), 0);
        return { name: curve.name, step: curve.x[at], value: curve.y[at] };
      });
    if (!shown.length) return hide();
    const nearest = shown.reduce((best, one) => (Math.abs(one.step - wanted) < Math.abs(best.step - wanted) ? one : best));
    tip.replaceChildren(Object.assign(document.createElement("div"), { textContent: "step " + nearest.step.toLocaleString("en") }));
    for (const one of shown.slice(0, 12)) {
      const line = document.createElement("div");
      const value = Object.assign(document.createElement("b"), { textContent: String(one.value) });
      line.append(value, " " + one.name + (one.step === nearest.step ? "" : " (step " + one.step.toLocaleString("en") + ")"));
      tip.append(line);
    }
    if (shown.length > 12) tip.append("and " + (shown.length - 12) + " more");
    const x = chart.left + (nearest.step - chart.x[0]) / ((chart.x[1] - chart.x[0]) || 1) * (chart.right - chart.left);
    cross.setAttribute("x1", x);
    cross.setAttribute("x2", x);
    svg.append(cross);
    tip.hidden = false;
    const left = x * box.width / svg.viewBox.baseVal.width;
    tip.style.left = Math.max(0, Math.min(left + 10, box.width - tip.offsetWidth)) + "px";
    tip.style.top = svg.offsetTop + box.height - 4 + "px";
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}

// Tables that may be sorted by a click on a heading.
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const body = table.tBodies[0];
      const rows = [...body.rows].sort((a, b) => key(a).localeCompare(key(b), "en", { numeric: true }));
      body.append(...(down ? rows.reverse() : rows));
    });
  });
}

// Where a number comes from, over the table instead of at the end of the page.
const dialog = document.createElement("dialog");
document.body.append(dialog);
for (const link of document.querySelectorAll("td a[href^='#']")) {
  link.addEventListener("click", (event) => {
    const article = document.getElementById(link.getAttribute("href").slice(1));
    if (!article || !dialog.showModal) return;
    event.preventDefault();
    const close = Object.assign(document.createElement("button"), { textContent: "Close" });
    close.addEventListener("click", () => dialog.close());
    const copy = article.cloneNode(true);
    copy.removeAttribute("id");
    dialog.replaceChildren(close, copy);
    dialog.showModal();
  });
}
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
