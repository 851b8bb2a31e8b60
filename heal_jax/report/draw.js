"use strict";
// Figures name colours as "$accent"; the style sheet of the current scheme says what they are.
const dark = matchMedia("(prefers-color-scheme: dark)");

function paint(value, key, style) {
  if (Array.isArray(value)) return value.map((item) => paint(item, key, style));
  if (value !== null && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, paint(item, name, style)]));
  }
  const named = typeof value === "string" && value.startsWith("$") && /color$/.test(key);
  return named ? style.getPropertyValue("--" + value.slice(1)).trim() : value;
}

function draw() {
  const style = getComputedStyle(document.documentElement);
  for (const place of document.querySelectorAll(".plot")) {
    const figure = paint(JSON.parse(place.nextElementSibling.textContent), "", style);
    Plotly.react(place, figure.data, figure.layout, { responsive: true, displayModeBar: false });
  }
}

draw();
dark.addEventListener("change", draw);
