// What all sections use: the data, elements, numbers, colours.
const data = JSON.parse(document.getElementById("data").textContent);

// Okabe and Ito's colours, which all kinds of colour vision tell apart; black is left to the page.
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7a7a7a"];
const DASHES = ["", "6 3", "2 3", "8 3 2 3"];
const SHAPES = ["circle", "square", "triangle", "diamond", "cross"];

// An element with attributes and children; text is always text, never markup.
function make(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "line", "path", "circle", "rect", "text", "polyline", "title"].includes(name);
  const element = svg ? document.createElementNS(at("drawing").namespaceURI, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children.filter(child => child !== null));
  return element;
}

function at(id) { return document.getElementById(id); }

// A number to four digits, thousands apart; a dash where there is none.
function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-4 || size >= 1e6) ? value.toExponential(digits - 1) : String(Number(value.toPrecision(digits)));
}

function style(index) {
  return {colour: COLOURS[index % COLOURS.length], dash: DASHES[Math.floor(index / COLOURS.length) % DASHES.length],
          shape: SHAPES[index % SHAPES.length]};
}

at("theme").addEventListener("click", () => {
  const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  root.dataset.theme = (root.dataset.theme || system) === "dark" ? "light" : "dark";
  document.dispatchEvent(new Event("theme"));
});
