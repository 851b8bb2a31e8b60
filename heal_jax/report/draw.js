"use strict";
// Figures are drawn when they come near the view, so that the page opens fast. They name colours as "$accent"; the style
// sheet of the current scheme says what they are.

function paint(value, key, style) {
  if (Array.isArray(value)) return value.map((item) => paint(item, key, style));
  if (value !== null && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, paint(item, name, style)]));
  }
  const named = typeof value === "string" && value.startsWith("$") && /color$/.test(key);
  return named ? style.getPropertyValue("--" + value.slice(1)).trim() : value;
}

const places = [...document.querySelectorAll(".plot")];
const drawn = new Set();

function draw(place) {
  drawn.add(place);
  const figure = paint(JSON.parse(place.nextElementSibling.textContent), "", getComputedStyle(document.documentElement));
  Plotly.react(place, figure.data, figure.layout, { displayModeBar: false });
}

const resized = new ResizeObserver((entries) => {
  for (const { target } of entries) if (drawn.has(target)) Plotly.Plots.resize(target);
});
const near = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting || drawn.has(target)) continue;
    draw(target);
    resized.observe(target);
  }
}, { rootMargin: "400px" });

places.forEach((place) => near.observe(place));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(draw));
addEventListener("beforeprint", () => places.filter((place) => !drawn.has(place)).forEach(draw));
