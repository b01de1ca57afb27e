"use strict";
// One cursor for all charts: the values of the step under the pointer; and the picker of sample steps.
const charts = JSON.parse(document.getElementById("charts").textContent);
const svgs = [...document.querySelectorAll("svg[data-chart]")];
const SVG = "http://www.w3.org/2000/svg";

function short(value, kind) {
  if (kind === "percent") return (100 * value).toFixed(1) + " %";
  const size = Math.abs(value), unit = kind === "seconds" ? " s" : "";
  if (size >= 1e4) {
    const [factor, letter] = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([f]) => size >= f);
    return Number((value / factor).toPrecision(3)) + letter + unit;
  }
  if (size >= 100) return Math.round(value) + unit;
  return (size !== 0 && size < 1e-3 ? value.toExponential(1) : Number(value.toPrecision(3))) + unit;
}

function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1; else high = middle;
  }
  return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
}

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  return made;
}

function show(index, step) {
  const chart = charts[index], cursor = svgs[index].querySelector(".cursor");
  const [x0, x1, left, right] = chart.x, x = (at) => left + (right - left) * (at - x0) / (x1 - x0);
  const shown = [element("path", { d: `M${x(step)} 10V170` })], texts = [];
  for (const curve of chart.curves) {
    const place = nearest(curve.x, step), value = curve.y[place];
    if (chart.y) {
      const [y0, y1, bottom, top, log] = chart.y, change = log ? Math.log10 : Number;
      const y = bottom + (top - bottom) * (change(value) - change(y0)) / (change(y1) - change(y0));
      shown.push(element("circle", { cx: x(curve.x[place]), cy: y, r: 3.6, class: "c" + curve.colour }));
    }
    if (chart.y || value > 0) texts.push([curve.label, value, curve.colour]);
  }
  cursor.replaceChildren(...shown);
  write(index, `step ${Math.round(step)}`, texts);
}

function write(index, head, texts) {
  const readout = svgs[index].closest("figure").querySelector(".readout");
  readout.replaceChildren(head);
  for (const [label, value, colour] of texts) {
    const number = document.createElement("em");
    number.textContent = short(value, charts[index].kind);
    const part = document.createElement("span");
    if (texts.length > 1) {
      const swatch = document.createElement("i");
      swatch.className = "swatch c" + colour;
      part.append(swatch);
    }
    part.append(label ? `${label} ` : "", number);
    readout.append(" ", part);
  }
}

function clear() {
  svgs.forEach((svg, index) => {
    svg.querySelector(".cursor").replaceChildren();
    const readout = svg.closest("figure").querySelector(".readout");
    readout.innerHTML = readout.dataset.last;
  });
}

svgs.forEach((svg, index) => {
  const readout = svg.closest("figure").querySelector(".readout");
  readout.dataset.last = readout.innerHTML;
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), [x0, x1, left, right] = charts[index].x;
    const at = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
    const step = x0 + (x1 - x0) * (Math.min(Math.max(at, left), right) - left) / (right - left);
    charts.forEach((_, other) => show(other, Math.min(Math.max(Math.round(step), Math.ceil(x0)), Math.floor(x1))));
  });
  svg.addEventListener("pointerleave", clear);
});

const picker = document.querySelector(".picker");
if (picker) {
  const select = picker.querySelector("select"), [before, after] = picker.querySelectorAll("button");
  const pick = () => {
    for (const body of document.querySelectorAll("tbody.step"))
      body.hidden = select.value !== "all" && body.dataset.step !== select.value;
    before.disabled = select.selectedIndex === 0;
    after.disabled = select.selectedIndex === select.options.length - 1;
  };
  before.addEventListener("click", () => { select.selectedIndex -= 1; pick(); });
  after.addEventListener("click", () => { select.selectedIndex += 1; pick(); });
  select.addEventListener("change", pick);
  picker.hidden = false;
  pick();
}
