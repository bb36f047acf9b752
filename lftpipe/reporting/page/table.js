// A table that sorts by any column, by click or Enter, and filters by text.

// columns: [{key, name, text}]; rows: objects; className(row) marks a row.
function sortable(place, {columns, rows, label, className = () => "", filter = true}) {
  const body = make("tbody"), head = make("tr"), count = make("span", {class: "note", "aria-live": "polite"});
  let order = {key: null, down: false};
  const search = make("input", {type: "search", placeholder: "filter", "aria-label": `Filter ${label}`});

  function draw() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = rows.filter(row => {
      const text = columns.map(column => number(row[column.key])).join(" ").toLowerCase();
      return words.every(word => text.includes(word));
    });
    if (order.key) shown = [...shown].sort((a, b) => compare(a[order.key], b[order.key]) * (order.down ? -1 : 1));
    body.replaceChildren(...shown.map(row => make("tr", {class: className(row)}, ...columns.map(column =>
      make("td", {class: column.text ? "text" : ""}, cell(row, column.key))))));
    count.textContent = shown.length === rows.length ? "" : `${shown.length} of ${rows.length}`;
  }

  function cell(row, key) {
    const spread = row.spread && row.spread[key];
    return number(row[key]) + (spread ? ` ± ${number(spread, 2)}` : "");
  }

  for (const column of columns) {
    const title = make("th", {scope: "col", class: column.text ? "text" : ""});
    const button = make("button", {type: "button"}, column.name);
    button.addEventListener("click", () => {
      order = {key: column.key, down: order.key === column.key && !order.down};
      for (const other of head.children) other.removeAttribute("aria-sort");
      title.setAttribute("aria-sort", order.down ? "descending" : "ascending");
      draw();
    });
    title.append(button);
    head.append(title);
  }
  search.addEventListener("input", draw);
  if (filter) place.append(make("div", {class: "controls"}, search, count));
  place.append(make("div", {class: "scroll", tabindex: 0, role: "region", "aria-label": label},
    make("table", {}, make("thead", {}, head), body)));
  draw();
  return {redraw(next) { rows = next; draw(); }};
}

// Numbers by size, text by the alphabet, and what is missing always last.
function compare(a, b) {
  const [noA, noB] = [a === null || a === undefined, b === null || b === undefined];
  if (noA || noB) return noA - noB;
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", {numeric: true});
}
