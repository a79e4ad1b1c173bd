import { make, roving, widget } from "./common.js";

// data: {label, message, prompt, follow, lens, lenses, ranks, vocabulary, tokens: [{shown, spoken}],
// depths, followed, cells[depth][column]: {shown, p, rank, likeliest, colours, by_rank}}
const after = (depth) => depth === "embed" ? "embedding" : `after block ${depth}`;

export function draw(data, choose) {
  const chosen = { prompt: data.prompt, follow: data.follow, lens: data.lens, ranks: data.ranks };
  const ask = (name, value) => { chosen[name] = value; choose({ ...chosen }); };
  const field = (name, label, text) => {
    const input = make("input", { type: "text", "aria-label": label, "data-key": name, class: `mi-${name}`, spellcheck: "false" });
    input.value = text;
    const changed = () => input.value !== chosen[name] && ask(name, input.value);
    input.addEventListener("change", changed);
    input.addEventListener("keydown", (event) => { if (event.key === "Enter") changed(); });
    return make("label", {}, [make("span", {}, label), input]);
  };
  const message = make("p", { class: "mi-message", role: "alert" }, data.message);
  const readout = make("p", { class: "mi-readout", "aria-hidden": "true" });
  const items = [], rows = [], all = [];
  const said = (depth, column) => {
    const cell = data.cells[depth][column];
    const list = cell.likeliest.map(([token, p]) => `${token} ${p.toFixed(3)}`).join(", ");
    return `${after(data.depths[depth])}, at ${data.tokens[column].spoken}: ${list}; ` +
      `${data.followed[column]} has rank ${cell.rank} of ${data.vocabulary}`;
  };
  const order = data.depths.map((_, depth) => depth).reverse();  // the model's own answer on top
  const lines = order.map((depth) => {
    const options = data.tokens.map((_, column) => {
      const option = make("span", { role: "option", class: "mi-cell", "aria-selected": "false",
        "aria-label": said(depth, column) });
      items.push(option);
      all.push({ depth, column });
      return option;
    });
    rows.push(options);
    const name = make("span", { class: "mi-depth", "aria-hidden": "true" }, data.depths[depth]);
    return make("div", { role: "group", class: "mi-row", "aria-label": after(data.depths[depth]) }, [name, ...options]);
  });
  const top = make("div", { class: "mi-row", "aria-hidden": "true" }, [make("span", { class: "mi-depth" }, "block"),
    ...data.tokens.map((token) => make("span", { class: "mi-column" }, make("bdi", {}, token.shown)))]);
  const list = make("div", { role: "listbox", class: "mi-table", "aria-label": data.label,
    style: `--columns:${data.tokens.length}` }, [top, ...lines]);
  const turn = make("button", { type: "button", "data-key": "ranks", "aria-pressed": String(data.ranks) }, "Show ranks");
  const paint = () => all.forEach(({ depth, column }, index) => {
    const cell = data.cells[depth][column], [colour, ink] = chosen.ranks ? cell.by_rank : cell.colours;
    items[index].replaceChildren(make("bdi", {}, chosen.ranks ? String(cell.rank) : cell.shown));
    items[index].style.cssText = `background-color:${colour};color:${ink}`;
  });
  turn.addEventListener("click", () => {
    chosen.ranks = !chosen.ranks;
    turn.setAttribute("aria-pressed", String(chosen.ranks));
    paint();
  });
  const lens = make("select", { "aria-label": "lens", "data-key": "lens" }, data.lenses.map((name) => make("option", { value: name }, name)));
  lens.value = data.lens;
  lens.addEventListener("change", () => ask("lens", lens.value));
  paint();
  roving(items, { rows, onMove: (index) => {
    readout.textContent = said(all[index].depth, all[index].column);
  } });
  const last = data.tokens.length - 1;
  readout.textContent = said(data.depths.length - 1, last);
  const head = make("div", { class: "mi-head" }, [field("prompt", "prompt", data.prompt), field("follow", "follow", data.follow),
    ...(data.lenses.length > 1 ? [lens] : []), turn]);
  return make("section", { "aria-label": data.label, class: "mi-lens" }, [head, message, list, readout]);
}

export default widget(draw);
