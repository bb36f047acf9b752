// Sections that are there only if something was found: adaptive steps, the sweep, texts, how to make it again.

function adaptive() {
  if (!data.adaptive.length) return at("adaptive").closest("section").remove();
  const runs = [...new Set(data.adaptive.map(row => row.run))];
  const line = (rows, run, index, name) => ({name, index, line: true, points: rows.filter(row => row.run === run)
    .map(row => ({x: row.nfe, y: row.kl, text: `${name}: mean NFE ${number(row.nfe, 3)}, KL ${number(row.kl)}`})).sort((a, b) => a.x - b.x)});
  chart(at("adaptive"), {title: "KL against the mean number of evaluations of a token", labels: {x: "mean NFE", y: "KL, nats per token"},
    series: runs.flatMap((run, i) => [line(data.rows, run, 2 * i, `${run}, fixed steps`), line(data.adaptive, run, 2 * i + 1, `${run}, chosen per token`)])});
}

function sweep() {
  const found = data.sweep;
  if (!found) return at("sweep").closest("section").remove();
  at("sweep-note").textContent = `${found.rows.length} blocks, ${found.settings.objective}, ${number(found.settings.tokens)} training tokens each. ` +
    "Spearman's coefficient of each figure of the map with the KL reached.";
  for (const [key, name] of found.predictors) {
    const entry = found.correlations.find(each => each.predictor === key && each.length === null && each.against === "kl");
    const said = !entry || entry.spearman === null ? "no rank correlation" : `Spearman ${number(entry.spearman, 2)} [${number(entry.low, 2)}, ${number(entry.high, 2)}]`;
    chart(at("sweep"), {title: `${name}: ${said}`, logY: true, labels: {x: name, y: "KL reached"},
      series: found.lengths.map((length, index) => ({name: `${length} layers`, index, line: false, points: found.rows
        .filter(row => row.length === length).map(row => ({x: row[key], y: row.kl, text: `block ${row.block}: ${name} ${number(row[key])}, KL ${number(row.kl)}`}))}))});
  }
}

function texts() {
  if (!data.samples.length) return at("texts").closest("section").remove();
  for (const sample of data.samples) {
    const column = (title, text) => make("div", {}, make("b", {}, title), make("pre", {}, text));
    at("texts").append(make("p", {class: "note"}, `Prompt: ${sample.prompt}`),
      make("div", {class: "texts"}, column(`teacher, ${sample.teacher}`, sample.teacher_text), column(`student, ${sample.run}`, sample.student_text)),
      make("p", {class: "note"}, `The first ${number(sample.common_tokens)} tokens agree.`));
  }
}

function again() {
  at("commands").append(make("pre", {}, data.commands.join("\n")));
  for (const run of data.runs) {
    at("commands").append(make("details", {}, make("summary", {}, run.name),
      make("p", {class: "note"}, run.facts), make("pre", {}, run.settings)));
  }
}

adaptive(); sweep(); texts(); again();
