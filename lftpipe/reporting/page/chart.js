// Line and point charts in SVG: hover, touch, or focus the chart and use the arrow keys to read a point.

const WIDTH = 560, HEIGHT = 330, LEFT = 84, RIGHT = 14, TOP = 12, BOTTOM = 46;

function scaleOf(values, log, low, high) {
  values = log ? values.filter(value => value > 0) : values;  // an interval may reach below zero
  let [least, most] = [Math.min(...values), Math.max(...values)];
  if (log) {
    least = Math.log10(least); most = Math.log10(most);
    const pad = Math.max((most - least) * .06, .03);
    least -= pad; most += pad;
  } else {
    const pad = (most - least || Math.abs(most) || 1) * .06;
    least -= pad; most += pad;
  }
  const place = value => low + ((log ? Math.log10(value) : value) - least) / (most - least) * (high - low);
  return {place, ticks: ticksOf(least, most, log)};
}

function ticksOf(least, most, log) {
  if (log) {
    const span = most - least, wanted = span > 2.2 ? [1] : span > .9 ? [1, 3] : [1, 1.5, 2, 3, 5, 7];
    const ticks = [];
    for (let power = Math.floor(least); power <= most; power++)
      for (const digit of wanted) {
        const place = power + Math.log10(digit);
        if (place >= least && place <= most) ticks.push(digit * 10 ** power);
      }
    if (ticks.length > 1) return ticks;
    return [0.15, 0.5, 0.85].map(part => Number((10 ** (least + part * span)).toPrecision(2)));
  }
  const raw = (most - least) / 5, unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(each => each * unit).find(each => each >= raw);
  const ticks = [];
  for (let tick = Math.ceil(least / step) * step; tick <= most; tick += step) ticks.push(Number(tick.toPrecision(10)));
  return ticks;
}

function tickText(value) {
  const size = Math.abs(value);
  for (const [limit, unit] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (size >= limit) return Number((value / limit).toPrecision(3)) + unit;
  return size && size < 1e-3 ? value.toExponential(0) : String(Number(value.toPrecision(3)));
}

function mark(shape, x, y, colour, size = 4.5) {
  const given = {class: "mark", fill: colour, stroke: colour};
  if (shape === "square") return make("rect", {...given, x: x - size, y: y - size, width: 2 * size, height: 2 * size});
  if (shape === "triangle") return make("path", {...given, d: `M${x},${y - size * 1.2} l${size * 1.2},${size * 2.1} h${-size * 2.4} z`});
  if (shape === "diamond") return make("path", {...given, d: `M${x},${y - size * 1.3} l${size * 1.3},${size * 1.3} l${-size * 1.3},${size * 1.3} l${-size * 1.3},${-size * 1.3} z`});
  if (shape === "cross") return make("path", {...given, fill: "none", "stroke-width": 2, d: `M${x - size},${y - size} l${2 * size},${2 * size} m0,${-2 * size} l${-2 * size},${2 * size}`});
  return make("circle", {...given, cx: x, cy: y, r: size});
}

function axes(svg, x, y, labels) {
  for (const tick of y.ticks) {
    const place = y.place(tick);
    svg.append(make("line", {class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: place, y2: place}),
      make("text", {x: LEFT - 7, y: place + 4, "text-anchor": "end"}, tickText(tick)));
  }
  for (const tick of x.ticks) {
    const place = x.place(tick);
    svg.append(make("line", {class: "grid", x1: place, x2: place, y1: TOP, y2: HEIGHT - BOTTOM}),
      make("text", {x: place, y: HEIGHT - BOTTOM + 17, "text-anchor": "middle"}, tickText(tick)));
  }
  svg.append(
    make("line", {class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM}),
    make("text", {x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 8, "text-anchor": "middle"}, labels.x),
    make("text", {x: 14, y: (TOP + HEIGHT - BOTTOM) / 2, "text-anchor": "middle",
      transform: `rotate(-90 14 ${(TOP + HEIGHT - BOTTOM) / 2})`}, labels.y));
}

// series: [{name, points: [{x, y, text, low, high}], line, index}], levels: [{name, y}], front: [{x, y}]
function chart(place, {title, labels, series, levels = [], front = [], logX = false, logY = false}) {
  const figure = make("figure", {}, make("figcaption", {}, title));
  series = series.map(one => ({...one, points: one.points.filter(
    p => Number.isFinite(p.x) && Number.isFinite(p.y) && (!logY || p.y > 0) && (!logX || p.x > 0))})).filter(one => one.points.length);
  const points = series.flatMap(one => one.points.map(point => ({...point, name: one.name, index: one.index})));
  levels = levels.filter(level => Number.isFinite(level.y) && (!logY || level.y > 0));
  if (!points.length) return;
  const x = scaleOf(points.map(p => p.x), logX, LEFT, WIDTH - RIGHT);
  const y = scaleOf([...points.flatMap(p => [p.y, p.low ?? p.y, p.high ?? p.y]), ...levels.map(l => l.y)], logY, HEIGHT - BOTTOM, TOP);
  const svg = make("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: 0, role: "img",
    "aria-label": `${title}. Arrow keys move from point to point.`});
  axes(svg, x, y, labels);
  for (const level of levels) {
    svg.append(make("line", {class: "front", x1: LEFT, x2: WIDTH - RIGHT, y1: y.place(level.y), y2: y.place(level.y)}),
      make("text", {x: WIDTH - RIGHT - 3, y: y.place(level.y) - 3, "text-anchor": "end", "font-size": 10}, level.name));
  }
  if (front.length > 1) svg.append(make("polyline", {class: "front", points: front.map(p => `${x.place(p.x)},${y.place(p.y)}`).join(" ")}));
  for (const one of series) {
    const {colour, dash} = style(one.index);
    if (one.line && one.points.length > 1) svg.append(make("polyline", {fill: "none", stroke: colour, "stroke-width": 2,
      "stroke-dasharray": dash, points: one.points.map(p => `${x.place(p.x)},${y.place(p.y)}`).join(" ")}));
    for (const p of one.points) if (p.low !== undefined && p.high > p.low) svg.append(make("line",
      {stroke: colour, x1: x.place(p.x), x2: x.place(p.x), y1: logY && p.low <= 0 ? HEIGHT - BOTTOM : y.place(p.low), y2: y.place(p.high)}));
  }
  const small = points.length > 80, marks = points.map(p => {
    const {colour, shape} = style(p.index);
    const element = mark(shape, x.place(p.x), y.place(p.y), colour, small ? 2 : 4.5);
    svg.append(element);
    return element;
  });
  figure.append(svg, ...legend(series), readout(svg, points, marks, x, y));
  place.append(figure);
}

function legend(series) {
  if (series.length < 2) return [];
  return [make("ul", {class: "legend"}, ...series.map(one => {
    const {colour, dash, shape} = style(one.index), svg = make("svg", {viewBox: "0 0 34 16", "aria-hidden": "true"});
    if (one.line) svg.append(make("line", {x1: 0, x2: 34, y1: 8, y2: 8, stroke: colour, "stroke-width": 2, "stroke-dasharray": dash}));
    svg.append(mark(shape, 17, 8, colour));
    return make("li", {}, svg, " " + one.name);
  }))];
}

// What the pointer, a finger or the arrow keys are at, as a line of text that screen readers hear too.
function readout(svg, points, marks, x, y) {
  const said = make("p", {class: "said", "aria-live": "polite"});
  const order = points.map((_, i) => i).sort((a, b) => points[a].x - points[b].x || points[a].y - points[b].y);
  let current = -1;
  function show(index) {
    if (index === current) return;
    if (current >= 0) marks[current].classList.remove("at");
    current = index;
    marks[index].classList.add("at");
    said.textContent = points[index].text;
  }
  function nearest(event) {
    const box = svg.getBoundingClientRect();
    const px = (event.clientX - box.left) * WIDTH / box.width, py = (event.clientY - box.top) * HEIGHT / box.height;
    let best = 0, least = Infinity;
    points.forEach((p, i) => {
      const distance = (x.place(p.x) - px) ** 2 + (y.place(p.y) - py) ** 2;
      if (distance < least) [best, least] = [i, distance];
    });
    show(best);
  }
  svg.addEventListener("pointermove", nearest);
  svg.addEventListener("pointerdown", nearest);
  svg.addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    if (!step) return;
    event.preventDefault();
    show(order[(Math.max(order.indexOf(current), step > 0 ? -1 : 0) + step + order.length) % order.length]);
  });
  return said;
}
