// What the tests measure in an open page. Each script of theirs begins with these functions.

const isShown = (element) => element.checkVisibility({ visibilityProperty: true, opacityProperty: true });

// Each chart: its title, its box, and of each curve the points, as numbers, and how many lie within the axes.
const charts = () => [...document.querySelectorAll("svg.chart")].filter(isShown).map((chart) => {
  const [, , width, height] = chart.dataset.plot.split(" ").map(Number);
  const curves = [...chart.querySelectorAll(".curve")].map((curve) => {
    const numbers = curve.querySelector("path").getAttribute("d").match(/[^ML,]+/g) ?? [];
    const dots = [...curve.querySelectorAll("circle")].flatMap((dot) => [dot.getAttribute("cx"), dot.getAttribute("cy")]);
    const points = numbers.map(Number);
    const within = points.filter((_, place) => place % 2 === 0)
      .filter((x, place) => x >= -0.1 && x <= width + 0.1 && points[2 * place + 1] >= -0.1 && points[2 * place + 1] <= height + 0.1);
    return {
      label: curve.dataset.label,
      isHidden: curve.hasAttribute("hidden") || !isShown(curve),
      isFinite: [...points, ...dots.map(Number)].every(Number.isFinite) && points.length % 2 === 0,
      points: points.length / 2,
      within: within.length,
    };
  });
  return { title: chart.closest("figure").querySelector("h3").textContent, width: chart.getBoundingClientRect().width, curves };
});

// Texts of charts that leave the drawing or lie over each other.
const misplacedTexts = () => [...document.querySelectorAll("svg.chart")].filter(isShown).flatMap((chart) => {
  const box = chart.getBoundingClientRect();
  const texts = [...chart.querySelectorAll("text")].map((text) => ({ text: text.textContent, at: text.getBoundingClientRect() }));
  const outside = texts.filter(({ at }) => at.left < box.left - 0.5 || at.right > box.right + 0.5 || at.top < box.top - 0.5 || at.bottom > box.bottom + 0.5);
  const title = chart.closest("figure").querySelector("h3").textContent;
  const over = texts.flatMap((one, place) => texts.slice(place + 1)
    .filter((other) => one.at.left < other.at.right - 1 && other.at.left < one.at.right - 1 && one.at.top < other.at.bottom - 3 && other.at.top < one.at.bottom - 3)
    .map((other) => `${title}: ${one.text} lies over ${other.text}`));
  return [...outside.map(({ text }) => `${title}: ${text} leaves the drawing`), ...over];
});

// What is wider than the window and has no scroll bar of its own.
const sticksOut = () => {
  const room = document.documentElement.clientWidth;
  const isIn = (element) => element.closest(".scroll, .stages, .tall") !== null;
  const wide = [...document.querySelectorAll("main *")].filter((each) => isShown(each) && !isIn(each) && each.getBoundingClientRect().right > room + 0.5);
  return [
    ...(document.documentElement.scrollWidth > room ? [`the page is ${document.documentElement.scrollWidth} wide, not ${room}`] : []),
    ...wide.map((each) => `${each.tagName} ${each.getAttribute("class")}: ${each.textContent.trim().slice(0, 40)}`),
  ];
};

const pencil = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
const colourOf = (text) => { // any colour of a style sheet as [red, green, blue, alpha], 0 to 1
  pencil.clearRect(0, 0, 1, 1);
  pencil.fillStyle = text;
  pencil.fillRect(0, 0, 1, 1);
  return [...pencil.getImageData(0, 0, 1, 1).data].map((each) => each / 255);
};
const over = (top, bottom) => [0, 1, 2].map((each) => top[each] * top[3] + bottom[each] * (1 - top[3])).concat(1);
const light = (colour) => {
  const [red, green, blue] = colour.map((each) => (each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
};
const backdrop = (element) => {
  const layers = [];
  for (let each = element; each; each = each.parentElement) {
    layers.push(colourOf(getComputedStyle(each).backgroundColor));
    if (layers.at(-1)[3] === 1) break;
  }
  return layers.reduceRight((below, layer) => over(layer, below), [1, 1, 1, 1]);
};

// The contrast of each text with what is behind it, as WCAG 2 defines it, the least first.
const contrasts = () => {
  const found = [];
  for (const element of document.querySelectorAll("main *")) {
    const text = [...element.childNodes].filter((each) => each.nodeType === Node.TEXT_NODE).map((each) => each.data.trim()).join(" ").trim();
    if (!text || !isShown(element) || !element.getBoundingClientRect().width) continue;
    const style = getComputedStyle(element);
    const ink = colourOf(element.closest("svg") ? style.fill : style.color);
    for (let each = element; each; each = each.parentElement) ink[3] *= Number(getComputedStyle(each).opacity);
    const behind = backdrop(element);
    const [one, other] = [light(over(ink, behind)), light(behind)].sort((a, b) => b - a);
    found.push([(one + 0.05) / (other + 0.05), text.slice(0, 40)]);
  }
  return found.sort((one, other) => one[0] - other[0]);
};

const brightness = () => light(backdrop(document.body));
const chartNamed = (title) => [...document.querySelectorAll("figure")].find((each) => each.querySelector("h3").textContent === title).querySelector("svg.chart");
const tipOf = (title) => { const tip = chartNamed(title).parentElement.querySelector(".tip"); return tip.hidden ? "" : tip.innerText; };
// A place of the window: at a share of a chart's x axis, in the middle of its height; the chart is scrolled to first.
const placeIn = (title, share) => {
  const chart = chartNamed(title);
  chart.scrollIntoView({ block: "center", behavior: "instant" });
  const [left, top, width, height] = chart.dataset.plot.split(" ").map(Number);
  const box = chart.getBoundingClientRect();
  const zoom = box.width / chart.viewBox.baseVal.width;
  return [box.left + (left + share * width) * zoom, box.top + (top + height / 2) * zoom];
};
const isWithin = (element, frame) => { const at = element.getBoundingClientRect(); return at.left >= 0 && at.right <= frame.innerWidth; };
// What lies left or right of the element that holds it, by more than some room.
const outsideOf = (selector, room) => {
  const box = document.querySelector(selector).getBoundingClientRect();
  const boxes = [...document.querySelector(selector).children].map((each) => each.getBoundingClientRect());
  return boxes.filter((at) => at.left < box.left - room || at.right > box.right + room).map((at) => [at.left, at.right]);
};
// Tables that are wider than their card: paper cannot be scrolled.
const cutTables = () => [...document.querySelectorAll(".scroll")].filter((each) => isShown(each) && each.scrollWidth > each.clientWidth + 1)
  .map((each) => each.innerText.slice(0, 40));
