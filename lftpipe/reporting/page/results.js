// Table 1, the headline and the figures that are drawn from it.

const MEAN_OF = ["kl_latent", "nmse", "nmse_without_first", "kl", "ppl", "agreement", "ppl_ratio", "ms_per_token"];

// The end of a run's name that says its seed, also of each run of a student.
const SEED = /-seed\d+(?= \+ |$)/g;

// Rows that differ by their seed alone as one: means, and half the width of a 95 % interval of the mean.
function foldSeeds(rows) {
  const groups = new Map();
  for (const row of rows) {
    const name = row.run && row.run.replace(SEED, "");
    const key = JSON.stringify([name, row.method, row.block, row.k, row.solver, row.nfe, row.train_tokens]);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(row);
  }
  return [...groups.values()].map(group => {
    if (group.length === 1) return group[0];
    const folded = {...group[0], run: group[0].run.replace(SEED, ""), seed: `${group.length} seeds`, spread: {}};
    for (const key of MEAN_OF) {
      const values = group.map(row => row[key]).filter(value => typeof value === "number");
      if (values.length < group.length) continue;
      const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
      const variance = values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (values.length - 1);
      folded[key] = mean;
      folded.spread[key] = STUDENT_95[Math.min(values.length - 1, STUDENT_95.length) - 1] * Math.sqrt(variance / values.length);
    }
    return folded;
  });
}

// The 97.5 % quantile of Student's t with 1, 2, ... degrees of freedom.
const STUDENT_95 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26];

const teacher = data.rows.find(row => row.method === "teacher");
const students = data.rows.filter(row => row.run);
const best = students.reduce((one, row) => (!one || row.kl < one.kl ? row : one), null);
const folded = foldSeeds(data.rows);
const names = [...new Set(folded.filter(row => row.run).map(row => row.run))].sort((a, b) => a.localeCompare(b, "en", {numeric: true}));
const indexOf = row => names.indexOf(row.run);

function headline() {
  const card = (value, label) => at("cards").append(make("div", {class: "card"}, make("b", {}, value), make("span", {}, label)));
  card(data.teacher, `teacher, ${number(teacher && teacher.parameters)} parameters`);
  if (!best) return;
  card(best.block, `layers replaced by the best student, ${best.run}`);
  card(number(best.kl, 3), "KL to the teacher, nats per token");
  if (teacher) {
    card(`${number(best.ppl, 4)}`, `perplexity (teacher ${number(teacher.ppl, 4)}, × ${number(best.ppl / teacher.ppl, 4)})`);
    card(`${number(100 * best.parameters / teacher.parameters, 3)} %`, `of the parameters (${number(best.parameters)})`);
    if (best.ms_per_token && teacher.ms_per_token)
      card(`× ${number(teacher.ms_per_token / best.ms_per_token, 3)}`, `the teacher's speed on the same stretch, ${best.k} ${best.solver} step${best.k > 1 ? "s" : ""} (NFE ${best.nfe})`);
  }
}

function table() {
  const columns = data.columns.map(([key, name]) => ({key, name, text: ["method", "run", "block", "solver"].includes(key)}));
  const named = rows => rows.map(row => ({...row}));
  const box = make("input", {type: "checkbox", id: "fold"});
  const several = folded.length < data.rows.length;
  box.checked = several;
  const made = sortable(at("table"), {columns, rows: named(several ? folded : data.rows), label: "Table 1",
    className: row => (!row.run ? "baseline" : best && row.kl === best.kl && row.run === best.run ? "best" : "")});
  if (!several) return;
  at("table").firstChild.append(make("label", {}, box, " fold seeds into means ± 95 % interval"));
  box.addEventListener("change", () => made.redraw(named(box.checked ? folded : data.rows)));
}

function describe(row) {
  const where = row.run ? `${row.run}, k = ${row.k}, ${row.solver}, NFE ${number(row.nfe)}` : row.method;
  return `${where}: KL ${number(row.kl)}, perplexity ${number(row.ppl)}, NMSE ${number(row.nmse_without_first)}, ${number(row.parameters)} parameters`;
}

function byRun(x, y, rows = folded) {
  return names.map((name, index) => ({name, index, line: true, points: rows.filter(row => row.run === name).map(row => ({
    x: row[x], y: row[y], text: describe(row),
    ...(row.spread && row.spread[y] ? {low: row[y] - row.spread[y], high: row[y] + row.spread[y]} : {})})).sort((a, b) => a.x - b.x)}));
}

// What no other point beats in both.
function paretoFront(series) {
  const points = series.flatMap(one => one.points).filter(p => p.y > 0).sort((a, b) => a.x - b.x || a.y - b.y);
  let least = Infinity;
  return points.filter(p => p.y < least && ((least = p.y), true));
}

function figures() {
  const skips = folded.filter(row => row.nfe === 0 && !row.run && students.some(run => run.block === row.block));
  const levels = key => skips.map(row => ({name: row.method, y: row[key]}));
  const cost = byRun("nfe", "kl"), size = byRun("parameters", "kl").map(one => ({...one, line: false}));
  chart(at("pareto"), {title: "KL against evaluations of the flow layer", series: cost, front: paretoFront(cost),
    labels: {x: "NFE", y: "KL, nats per token"}, logY: true});
  chart(at("pareto"), {title: "KL against parameters", series: size, front: paretoFront(size),
    labels: {x: "parameters", y: "KL, nats per token"}, logY: true});
  const many = byRun("k", "nmse_without_first").filter(one => one.points.length > 1);
  if (many.length) {
    chart(at("steps"), {title: "NMSE without first positions against steps k", series: byRun("k", "nmse_without_first"),
      levels: levels("nmse_without_first"), labels: {x: "steps k", y: "NMSE"}, logY: true});
    chart(at("steps"), {title: "KL of states against steps k", series: byRun("k", "kl_latent"),
      levels: levels("kl_latent"), labels: {x: "steps k", y: "KL_x, nats"}, logY: true});
  } else at("steps").closest("section").remove();
}

function training() {
  const runs = Object.entries(data.curves);
  if (!runs.length) return at("training").closest("section").remove();
  const isValidated = rows => rows.some(row => "validation_nmse" in row);
  const validated = runs.some(([, rows]) => isValidated(rows));
  const draw = (keyOf, title) => {
    const series = runs.map(([run, rows], index) => {
      const key = keyOf(rows), name = run + (key === "nmse" && validated ? " (training batches)" : "");
      return {name, index, line: true, points: rows.filter(row => key in row).map(row => ({
        x: row.tokens, y: row[key], text: `${name} after ${number(row.tokens)} tokens: ${number(row[key])}`}))};
    })
      .filter(one => one.points.length);  // a healed run has no NMSE: what comes after its block changes too
    if (series.length) chart(at("training"), {title, logY: true, labels: {x: "training tokens", y: title.split(",")[0]}, series});
  };
  draw(rows => (isValidated(rows) ? "validation_nmse" : "nmse"), validated ? "NMSE, on validation sequences" : "NMSE, on training batches");
  draw(() => "loss", "loss, as each run defines it");
  if (data.damaged.length) at("training").append(make("p", {class: "warn"}, data.damaged.join("; ")));
}

// Tasks, continuations, intervals, comparisons: tables whose cells are texts.
function sections() {
  for (const {title, note, heading, cells} of data.sections) {
    const place = make("div"), columns = heading.map((name, index) => ({key: `c${index}`, name, text: index === 0}));
    at("sections").append(make("section", {id: title.toLowerCase().replaceAll(" ", "-")},
      make("h2", {}, title), make("p", {class: "note"}, note), place));
    const rows = cells.map(row => Object.fromEntries(row.map((text, index) => [`c${index}`, text])));
    sortable(place, {columns, rows, label: title, filter: false, className: row => (row.c0 === "teacher" ? "baseline" : "")});
  }
}

headline(); table(); sections(); figures(); training();
