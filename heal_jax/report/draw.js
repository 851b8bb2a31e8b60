"use strict";
// Figures name colours as "$accent"; the style sheet of the current scheme says what they are.

function paint(value, key, style) {
  if (Array.isArray(value)) return value.map((item) => paint(item, key, style));
  if (value !== null && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, paint(item, name, style)]));
  }
  const named = typeof value === "string" && value.startsWith("$") && /color$/.test(key);
  return named ? style.getPropertyValue("--" + value.slice(1)).trim() : value;
}

const places = document.querySelectorAll(".plot");

function draw() {
  const style = getComputedStyle(document.documentElement);
  for (const place of places) {
    const figure = paint(JSON.parse(place.nextElementSibling.textContent), "", style);
    Plotly.react(place, figure.data, figure.layout, { displayModeBar: false });
  }
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
const resized = new ResizeObserver((entries) => entries.forEach((entry) => Plotly.Plots.resize(entry.target)));
places.forEach((place) => resized.observe(place));
