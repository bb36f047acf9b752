// The recoupling map: hover a pair of states, or move by the arrow keys, to see its numbers and its transport.

function recouplingMap(found) {
  const size = found.layers.length, cell = Math.max(12, Math.min(34, Math.floor(620 / size))), edge = 46;
  const canvas = at("map"), plan = at("plan"), shown = at("shown"), pixels = window.devicePixelRatio || 1;
  const figures = [
    ["ratio", "R"], ["ratio_stderr", "± standard error"], ["ratio_raw", "R raw, without credit for ties"],
    ["transport_cost", "mean cost, optimal"], ["identity_cost", "mean cost, as paired"],
    ["random_cost", "mean cost, random pairing"], ["relative_gap", "relative gap"],
    ["relative_displacement", "relative displacement"], ["influence", "influence"]].filter(([key]) => found[key]);
  let [m, n] = found.shown;
  const muted = () => getComputedStyle(document.documentElement).getPropertyValue("--muted");
  const warm = () => getComputedStyle(document.documentElement).getPropertyValue("--warm");
  const accent = () => getComputedStyle(document.documentElement).getPropertyValue("--accent");
  at("scale").style.background = `linear-gradient(to right, ${found.colours.map(colour => `rgb(${colour})`)})`;

  function prepare(target, width, height) {
    target.width = width * pixels; target.height = height * pixels; target.style.width = width + "px";
    const pen = target.getContext("2d");
    pen.scale(pixels, pixels);
    return pen;
  }

  function highest() {
    if (shown.value.startsWith("ratio")) return 1;
    return Math.max(1e-12, ...found[shown.value].flat().filter(value => value !== null));
  }

  function short(value) {
    const text = value.toFixed(2);
    return text === "0.00" ? "0" : text === "1.00" ? "1" : text.replace(/^(-?)0\./, "$1.");
  }

  function drawMap() {
    const pen = prepare(canvas, edge + size * cell, edge + size * cell), high = highest();
    at("highest").textContent = number(high, 3);
    pen.textAlign = "center"; pen.textBaseline = "middle"; pen.fillStyle = muted(); pen.font = "13px system-ui";
    pen.fillText("state n, after the block", edge + size * cell / 2, size * cell + 34);
    pen.save(); pen.translate(9, size * cell / 2); pen.rotate(-Math.PI / 2);
    pen.fillText("state m, before the block", 0, 0); pen.restore();
    const every = Math.ceil(14 / cell);
    for (let row = 0; row < size; row++) {
      pen.fillStyle = muted(); pen.font = "11px system-ui";
      if (row % every === 0) {
        pen.fillText(found.layers[row], edge - 13, (row + .5) * cell);
        pen.fillText(found.layers[row], edge + (row + .5) * cell, size * cell + 12);
      }
      for (let column = row + 1; column < size; column++) {
        const value = found[shown.value][row][column], part = Math.max(0, Math.min(1, value / high));
        pen.fillStyle = `rgb(${found.colours[Math.round((found.colours.length - 1) * part)]})`;
        pen.fillRect(edge + column * cell, row * cell, cell - 1, cell - 1);
        if (cell >= 22) {
          pen.fillStyle = part > .55 ? "#000" : "#fff"; pen.font = "9px system-ui";
          pen.fillText(short(value), edge + (column + .5) * cell, (row + .5) * cell);
        }
      }
    }
    pen.strokeStyle = warm(); pen.lineWidth = 2;
    pen.strokeRect(edge + n * cell + 1, m * cell + 1, cell - 3, cell - 3);
  }

  function drawPair() {
    const partner = found.partners[m][n], count = partner.length, width = 320, length = found.layers[n] - found.layers[m];
    at("pair").textContent = `block ${found.layers[m]}:${found.layers[n]}, ${length} layer${length === 1 ? "" : "s"}`;
    at("numbers").replaceChildren(...figures.map(([key, label]) =>
      make("tr", {}, make("td", {class: "text"}, label), make("td", {}, number(found[key][m][n])))));
    const pen = prepare(plan, width + 2, width + 2), dot = Math.max(2.5, Math.min(5, width / count));
    const place = index => 1 + index * (width - dot) / Math.max(1, count - 1);
    pen.strokeStyle = muted(); pen.strokeRect(.5, .5, width + 1, width + 1);
    partner.forEach((column, row) => {
      pen.fillStyle = column === row ? accent() : warm();
      pen.fillRect(place(column), place(row), dot, dot);
    });
  }

  function choose(row, column) {
    if (row < 0 || column >= size || row >= column || (row === m && column === n)) return;
    [m, n] = [row, column];
    drawMap(); drawPair();
  }

  function point(event) {
    const box = canvas.getBoundingClientRect(), zoom = (edge + size * cell) / box.width;
    choose(Math.floor((event.clientY - box.top) * zoom / cell), Math.floor(((event.clientX - box.left) * zoom - edge) / cell));
  }
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point);
  canvas.addEventListener("keydown", event => {
    const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
    if (!step) return;
    event.preventDefault();
    choose(m + step[0], n + step[1]);
  });
  shown.addEventListener("change", drawMap);
  document.addEventListener("theme", () => { drawMap(); drawPair(); });
  const used = found.settings;
  at("map-note").textContent = `${used.batches} batches of ${used.tokens} tokens, ${used.metric}` +
    (used.standardise ? ", standardised" : "") + (used.skip_first ? ", without first positions" : "") + `; store ${found.store_fingerprint}`;
  if (found.approximate) at("map-note").prepend(make("span", {class: "warn"}, "Approximate (Sinkhorn): a guide only. "));
  drawMap(); drawPair();
}

if (data.map) recouplingMap(data.map);
else if (at("map")) at("map").closest("section").remove();
