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
const scaled = (value, digits) => {
  const units = ["", "k", "M", "B", "T"];
  let unit = 0;
  while (Math.abs(value) >= 999.5 && unit < 4) { value /= 1000; unit += 1; }
  return value.toPrecision(digits) + units[unit];
};
const written = {
  plain: (value, digits) => (value !== 0 && (Math.abs(value) < 1e-2 || Math.abs(value) >= 1e5) ? value.toExponential(digits - 1) : String(Number(value.toPrecision(digits + 1)))),
  count: (value, digits) => (Math.abs(value) < 1e5 ? Math.round(value).toLocaleString("en") : scaled(value, digits)),
  share: (value, digits) => `${(100 * value).toPrecision(digits)} %`,
  gigabytes: (value, digits) => `${value.toPrecision(digits)} GB`,
};
const axis = (text) => {
  const [low, high, kind, unit] = text.split(" ");
  const [from, to] = [Number(low), Number(high)];
  const at = kind === "log" ? (share) => from * (to / from) ** share : (share) => from + (to - from) * share;
  // an axis that shows a narrow part far from 0 needs more digits
  const narrow = kind === "log" ? 1 : Math.max(Math.abs(from), Math.abs(to)) / (to - from);
  const digits = narrow < 10 ? 3 : 3 + Math.ceil(Math.log10(narrow));
  return { at, write: (value) => written[unit](value, digits) };
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
  const shown = () => curves.filter(({ curve }) => !curve.hasAttribute("hidden"));
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  line.setAttribute("class", "pointer");
  line.setAttribute("y1", 0);
  line.setAttribute("y2", height);
  line.setAttribute("hidden", "");
  plot.append(line);
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  tip.hidden = true;
  chart.parentElement.append(tip);
  let current = null; // where the line is, in the plot's units

  const hide = () => { current = null; tip.hidden = true; line.setAttribute("hidden", ""); };
  const show = (place) => {
    const found = shown().map(({ curve, points }) => ({
      curve,
      nearest: points.reduce((best, point) => (Math.abs(point[0] - place) < Math.abs(best[0] - place) ? point : best)),
    }));
    const distance = ({ nearest }) => Math.abs(nearest[0] - place);
    const least = Math.min(...found.map(distance));
    const near = found.filter((each) => distance(each) <= least + 12 && each.nearest[1] <= height);
    if (place < 0 || place > width || !near.length) { hide(); return; }
    const at = near.find((each) => distance(each) === least) ?? near[0];
    current = at.nearest[0];
    line.setAttribute("x1", current);
    line.setAttribute("x2", current);
    line.removeAttribute("hidden");
    const head = document.createElement("b");
    head.textContent = x.write(x.at(current / width));
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
    const box = chart.getBoundingClientRect();
    const right = ((left + current) * box.width) / chart.viewBox.baseVal.width;
    const room = right + 12 + tip.offsetWidth <= box.width;
    tip.style.left = `${Math.max(0, room ? right + 12 : right - 12 - tip.offsetWidth)}px`;
  };
  const point = (event) => {
    const box = chart.getBoundingClientRect();
    show(((event.clientX - box.left) * chart.viewBox.baseVal.width) / box.width - left);
  };
  chart.addEventListener("pointermove", point);
  chart.addEventListener("pointerdown", point);
  // a finger leaves as soon as it is lifted: the values stay until it taps elsewhere
  chart.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") hide(); });
  document.addEventListener("pointerdown", (event) => { if (!chart.contains(event.target)) hide(); });

  // the arrow keys go to the next point that is a hundredth of the width away
  const moves = {
    ArrowRight: (places) => places.find((place) => place >= (current ?? -width) + width / 100) ?? current,
    ArrowLeft: (places) => places.findLast((place) => place <= (current ?? 2 * width) - width / 100) ?? current,
    Home: (places) => places[0],
    End: (places) => places.at(-1),
  };
  chart.tabIndex = 0;
  chart.addEventListener("blur", hide);
  chart.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { hide(); return; }
    const move = event.altKey || event.ctrlKey || event.metaKey ? undefined : moves[event.key];
    const visible = (place, drop) => place >= 0 && place <= width && drop <= height;
    const places = shown().flatMap(({ points }) => points.filter((each) => visible(...each)).map(([place]) => place));
    if (!move || !places.length) return;
    event.preventDefault();
    show(move(places.sort((one, other) => one - other)));
  });
}
