"use strict";
// The legend hides runs.
for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") === "false";
    button.setAttribute("aria-pressed", shown);
    for (const each of document.querySelectorAll(`[data-run="${button.dataset.shows}"]`)) {
      // an SVG element has no property `hidden`
      each.toggleAttribute("hidden", !shown);
    }
  });
}

// A chart shows the values of its curves at the pointer, read back from their coordinates.
const scaled = (value) => {
  const units = ["", "k", "M", "B", "T"];
  let unit = 0;
  while (Math.abs(value) >= 999.5 && unit < 4) { value /= 1000; unit += 1; }
  return value.toPrecision(3) + units[unit];
};
const written = {
  plain: (value) => (value !== 0 && (Math.abs(value) < 1e-2 || Math.abs(value) >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(4)))),
  count: (value) => (Math.abs(value) < 1e5 ? Math.round(value).toLocaleString("en") : scaled(value)),
  share: (value) => `${(100 * value).toPrecision(3)} %`,
  gigabytes: (value) => `${value.toPrecision(3)} GB`,
};
const axis = (text) => {
  const [low, high, kind, unit] = text.split(" ");
  const [from, to] = [Number(low), Number(high)];
  const at = kind === "log" ? (share) => from * (to / from) ** share : (share) => from + (to - from) * share;
  return { at, write: written[unit] };
};

for (const chart of document.querySelectorAll("svg.chart")) {
  const [left, top, width, height] = chart.dataset.plot.split(" ").map(Number);
  const x = axis(chart.dataset.x);
  const y = axis(chart.dataset.y);
  const plot = chart.querySelector(".plot");
  const curves = [...plot.querySelectorAll(".curve:not(.faint)")].map((curve) => ({
    curve,
    points: curve.querySelector("path").getAttribute("d").slice(1).split("L").map((point) => point.split(",").map(Number)),
  }));
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  line.setAttribute("class", "pointer");
  line.setAttribute("y1", 0);
  line.setAttribute("y2", height);
  line.setAttribute("hidden", "");
  plot.append(line);
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  chart.parentElement.append(tip);

  const hide = () => { tip.hidden = true; line.setAttribute("hidden", ""); };
  const show = (event) => {
    const box = chart.getBoundingClientRect();
    const zoom = chart.viewBox.baseVal.width / box.width;
    const place = (event.clientX - box.left) * zoom - left;
    const found = [];
    for (const { curve, points } of curves) {
      if (curve.hasAttribute("hidden")) continue;
      const nearest = points.reduce((best, point) => (Math.abs(point[0] - place) < Math.abs(best[0] - place) ? point : best));
      found.push({ curve, nearest });
    }
    const distance = ({ nearest }) => Math.abs(nearest[0] - place);
    const least = Math.min(...found.map(distance));
    const near = found.filter((each) => distance(each) <= least + 12 && each.nearest[1] <= height);
    if (place < 0 || place > width || !near.length) { hide(); return; }
    const at = near.find((each) => distance(each) === least) ?? near[0];
    line.setAttribute("x1", at.nearest[0]);
    line.setAttribute("x2", at.nearest[0]);
    line.removeAttribute("hidden");
    const head = document.createElement("b");
    head.textContent = x.write(x.at(at.nearest[0] / width));
    near.sort((one, other) => one.nearest[1] - other.nearest[1]);
    const rows = near.slice(0, 10).map(({ curve, nearest }) => {
      const row = document.createElement("div");
      row.className = curve.getAttribute("class");
      row.style.setProperty("--shade", curve.style.getPropertyValue("--shade"));
      row.textContent = `${curve.dataset.label}: ${y.write(y.at(1 - nearest[1] / height))}`;
      return row;
    });
    if (near.length > 10) { const more = document.createElement("span"); more.textContent = `and ${near.length - 10} more`; rows.push(more); }
    tip.replaceChildren(head, ...rows);
    tip.hidden = false;
    const right = (left + at.nearest[0]) / zoom;
    const room = right + 12 + tip.offsetWidth <= box.width;
    tip.style.left = `${Math.max(0, room ? right + 12 : right - 12 - tip.offsetWidth)}px`;
  };
  chart.addEventListener("pointermove", show);
  chart.addEventListener("pointerdown", show);
  chart.addEventListener("pointerleave", hide);
}
