"use strict";
// The page shows everything without this script. With it, one can point at curves, sort tables, and
// see the sources of a number without leaving the table.

const SVG = "http://www.w3.org/2000/svg";

// Shows the values of all visible curves at the step under the pointer.
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
        const distance = (x) => Math.abs(x - wanted);
        const at = curve.x.reduce(
          (best, x, i) => (distance(x) < distance(curve.x[best]) ? i : best), 0);
        return { name: curve.name, step: curve.x[at], value: curve.y[at] };
      });
    if (!shown.length) return hide();
    const nearest = shown.reduce(
      (best, one) => (Math.abs(one.step - wanted) < Math.abs(best.step - wanted) ? one : best));
    const title = "step " + nearest.step.toLocaleString("en");
    tip.replaceChildren(Object.assign(document.createElement("div"), { textContent: title }));
    for (const one of shown.slice(0, 12)) {
      const line = document.createElement("div");
      const value = Object.assign(document.createElement("b"), { textContent: String(one.value) });
      const step = one.step === nearest.step ? "" : " (step " + one.step.toLocaleString("en") + ")";
      line.append(value, " " + one.name + step);
      tip.append(line);
    }
    if (shown.length > 12) tip.append("and " + (shown.length - 12) + " more");
    const place = (nearest.step - chart.x[0]) / ((chart.x[1] - chart.x[0]) || 1);
    const x = chart.left + place * (chart.right - chart.left);
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

// Sorts a table at a click on a heading.
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      const sorted = table.querySelectorAll("th[aria-sort]");
      sorted.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const body = table.tBodies[0];
      const order = (a, b) => key(a).localeCompare(key(b), "en", { numeric: true });
      const rows = [...body.rows].sort(order);
      body.append(...(down ? rows.reverse() : rows));
    });
  });
}

// Shows the sources of a number over the table instead of at the end of the page.
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
