import { make, roving, widget } from "./common.js";

// data: {label, message, prompt, live, tokens: [{shown, spoken}], rows: ["words", "0", …, "answer"],
// nodes: [{id, kind, row, column, name, short, said, value, influence, cumulative}], groups: {name: [id]},
// links: [[source, target, weight]], cards: {id: {contexts, raises, lowers}}, start: {node, edge},
// acts: whether the model is at hand, done: [{nodes, factor, answers: [[token, before, after]] or message}]}
const NS = "http://www.w3.org/2000/svg";
const WIDTH = 800, HEIGHT = 400, LEFT = 52, BOTTOM = 26, TOP = 16, MOST = 400, IN_CARD = 6, OF_ANSWER = 3;
const FACTORS = [0, -1, 2];
const NO_MODEL = "To multiply this node, the model has to run: in a notebook, views.graph(…, act=…).";
const SHAPES = {
  feature: (r) => ({ d: `M ${-r} 0 a ${r} ${r} 0 1 0 ${2 * r} 0 a ${r} ${r} 0 1 0 ${-2 * r} 0` }),
  embedding: (r) => ({ d: `M ${-r} ${-r} H ${r} V ${r} H ${-r} Z` }),
  error: (r) => ({ d: `M 0 ${-r} L ${r} 0 L 0 ${r} L ${-r} 0 Z` }),
  logit: (r) => ({ d: `M 0 ${-r} L ${r} ${r} H ${-r} Z` }),
};
const times = (x) => `×${String(x).replace("-", "−")}`;
const key_of = (ids, factor) => `${Number(factor)} ${[...ids].sort().join(" ")}`;
const signed = (x) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(2);

function draw_in(tag, attributes = {}, children = []) {
  const node = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...[children].flat());
  return node;
}

// The nodes and links that two thresholds leave. A logit is always there, with its strongest links.
function chosen_part(data, limits, pinned) {
  const wanted = (node) => node.kind === "logit" || pinned.has(node.id) ||
    (node.kind !== "embedding" && node.cumulative <= limits.node);
  const shown = new Set(data.nodes.flatMap((node, i) => wanted(node) ? [i] : []));
  const into = new Map();
  for (const link of data.links) {
    const word = data.nodes[link[0]].kind === "embedding";
    if (shown.has(link[1]) && (shown.has(link[0]) || word)) {
      if (!into.has(link[1])) into.set(link[1], []);
      into.get(link[1]).push(link);
    }
  }
  const links = [];
  for (const [target, all] of into) {
    all.sort((a, b) => Math.abs(b[2]) - Math.abs(a[2]));
    const total = all.reduce((sum, each) => sum + Math.abs(each[2]), 0);
    let sum = 0, count = 0;
    for (const link of all) {
      const due = data.nodes[target].kind === "logit" && count < OF_ANSWER;
      if (sum >= limits.edge * total && !due) break;
      links.push(link);
      sum += Math.abs(link[2]);
      count += 1;
    }
  }
  for (const [source] of links) shown.add(source);
  return { shown, links };
}

function places(data, shown) {
  const cells = new Map(), wide = data.tokens.map(() => 1);
  for (const i of shown) {
    const { row, column } = data.nodes[i], key = `${row} ${column}`;
    cells.set(key, [...(cells.get(key) || []), i]);
    wide[column] = Math.max(wide[column], Math.min(cells.get(key).length, 9));
  }
  const unit = (WIDTH - LEFT) / wide.reduce((a, b) => a + b, 0), borders = [LEFT];
  for (const each of wide) borders.push(borders.at(-1) + each * unit);
  const high = (HEIGHT - BOTTOM - TOP) / data.rows.length, at = new Map();
  for (const members of cells.values()) {
    members.forEach((i, k) => {
      const { row, column } = data.nodes[i];
      const x = borders[column] + (k + 0.5) * (borders[column + 1] - borders[column]) / members.length;
      at.set(i, [x, HEIGHT - BOTTOM - (row + 0.5) * high + (k % 2 ? 6 : -6)]);
    });
  }
  return { at, borders, high };
}

export function draw(data, choose) {
  const state = { prompt: data.prompt, node: "", pinned: [], groups: { ...data.groups } };
  const pinned = new Set(Object.values(state.groups).flat()), limits = { ...data.start };
  const index = new Map(data.nodes.map((node, i) => [node.id, i]));
  const most = Math.max(...data.nodes.map((node) => node.influence), 1e-9);
  let selected = data.nodes.findIndex((node) => node.kind === "logit"), part, go = () => {}, items = [], order = [];
  const tell = (more) => choose(Object.assign(state, { pinned: [...pinned] }, more) && { ...state });

  const canvas = draw_in("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "listbox", "aria-label": data.label });
  const outcome = make("div", { role: "status", class: "mi-outcome" });  // stays in the page, so that it is read out
  const head_of_card = make("div"), rest_of_card = make("div");
  const card = make("div", { class: "mi-card", role: "region", "aria-label": "card of the node" },
    [head_of_card, outcome, rest_of_card]);
  const done = new Map(data.done.map((each) => [key_of(each.nodes, each.factor), each])), last = new Map();
  const below = make("div", { class: "mi-groups" });
  const group_of = (id) => Object.keys(state.groups).find((name) => state.groups[name].includes(id)) || "";

  const jump = (i) => {
    if (!part.shown.has(i)) { pinned.add(data.nodes[i].id); paint(); }
    go(order.indexOf(i));
  };
  const edges_of = (end, title) => {
    const own = data.links.filter((link) => link[end] === selected)
      .sort((a, b) => Math.abs(b[2]) - Math.abs(a[2])).slice(0, IN_CARD);
    if (!own.length) return [];
    const rows = own.map((link) => {
      const other = link[1 - end];
      const button = make("button", { type: "button" }, [make("b", {}, signed(link[2])), " ", data.nodes[other].name]);
      button.addEventListener("click", () => jump(other));
      return make("li", {}, button);
    });
    return [make("h4", {}, title), make("ul", {}, rows)];
  };
  const toggle = (i) => {
    const id = data.nodes[i].id;
    if (!pinned.delete(id)) pinned.add(id);
    else for (const name of Object.keys(state.groups)) state.groups[name] = state.groups[name].filter((each) => each !== id);
    paint();
    tell({ node: id });
  };
  // What a node or its group is multiplied by, and what the next word becomes.
  const report = () => {
    const asked = last.get(data.nodes[selected].id), found = asked && done.get(asked.key);
    if (!asked) return outcome.replaceChildren();
    const title = make("p", {}, make("b", {}, `${times(asked.factor)}: ${asked.name}`));
    if (!found?.answers) return outcome.replaceChildren(title, make("p", {}, found ? found.message : "The model runs …"));
    const cells = (tag, row) => make("tr", {}, row.map((text) => make(tag, {}, text)));
    outcome.replaceChildren(title, make("table", {}, [cells("th", ["next word", "before", "after"]),
      ...found.answers.map(([word, before, after]) => cells("td", [word, before.toFixed(3), after.toFixed(3)]))]));
  };
  const act = (name, nodes, factor) => {
    const key = key_of(nodes, factor), here = data.nodes[selected].id;
    last.set(here, { key, name, factor });
    if (!done.has(key)) choose({ ...state, pinned: [...pinned], node: here, act: { nodes, factor } });
    report();
  };
  const acts_of = (i) => {
    const node = data.nodes[i], group = group_of(node.id);
    if (node.kind === "logit") return [];
    const targets = [[node.name, [node.id]]];
    if (group) targets.push([`the group ${group}`, state.groups[group].filter((id) => data.nodes[index.get(id)].kind !== "logit")]);
    const rows = targets.flatMap(([name, nodes]) => {
      const factors = FACTORS.filter((factor) => data.acts || done.has(key_of(nodes, factor)));
      const buttons = factors.map((factor) => {
        const button = make("button", { type: "button", "aria-label": `${times(factor)}: ${name}` }, times(factor));
        button.addEventListener("click", () => act(name, nodes, factor));
        return button;
      });
      const said = name === node.name ? "multiply it: " : `multiply ${name}: `;
      return factors.length ? [make("p", { class: "mi-acts" }, [said, ...buttons])] : [];
    });
    return rows.length ? rows : [make("p", {}, NO_MODEL)];
  };
  const show = (i) => {
    selected = i;
    const node = data.nodes[i], more = data.cards[node.id] || {};
    const pin = make("button", { type: "button", "data-key": "pin", "aria-pressed": String(pinned.has(node.id)) }, "Pin");
    pin.addEventListener("click", () => { toggle(i); show(i); card.querySelector("button").focus(); });
    const contexts = (more.contexts || []).map((piece) => make("p", { class: "mi-context" }, piece.map(([word, share]) =>
      share > 0 ? make("mark", { style: `background:rgba(230,159,0,${0.2 + 0.8 * share})` }, word) : word)));
    const words = (title, list) => list?.length
      ? [make("p", {}, [make("b", {}, `${title}: `), list.map(([word, x]) => `${word} ${signed(x)}`).join(", ")])] : [];
    head_of_card.replaceChildren(make("p", {}, [make("b", {}, node.name), ` ${node.said} `, pin]), ...acts_of(i));
    report();
    rest_of_card.replaceChildren(
      ...(contexts.length ? [make("h4", {}, "Where it fires most"), ...contexts] : []),
      ...words("Raises", more.raises), ...words("Lowers", more.lowers),
      ...edges_of(1, "Edges in"), ...edges_of(0, "Edges out"));
    for (const line of canvas.querySelectorAll(".mi-edge")) {
      const near = line.dataset.source === String(i) || line.dataset.target === String(i);
      line.classList.toggle("mi-near", near);
    }
    order.forEach((each, k) => items[k].classList.toggle("mi-here", each === i));
  };

  // Links between groups, pinned nodes and answers, summed: the graph on a postcard.
  const summary = () => {
    const of = (i) => group_of(data.nodes[i].id) || (pinned.has(data.nodes[i].id) || data.nodes[i].kind === "logit" ? data.nodes[i].name : "");
    const sums = new Map();
    for (const [source, target, weight] of data.links) {
      const [a, b] = [of(source), of(target)];
      if (a && b && a !== b) sums.set(`${a} → ${b}`, (sums.get(`${a} → ${b}`) || 0) + weight);
    }
    const lines = [...sums].sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, 10);
    const name = make("input", { type: "text", "aria-label": "name of the group", "data-key": "group", spellcheck: "false" });
    const button = make("button", { type: "button", "data-key": "make" }, "Group the pinned");
    button.addEventListener("click", () => {
      const free = [...pinned].filter((id) => !group_of(id)), text = name.value.trim();
      if (!free.length || !text) return;
      state.groups[text] = [...(state.groups[text] || []), ...free];
      paint();
      tell({});
    });
    const apart = Object.entries(state.groups).filter(([, ids]) => ids.length).map(([text, ids]) => {
      const off = make("button", { type: "button", "aria-label": `Ungroup ${text}` }, "×");
      off.addEventListener("click", () => { delete state.groups[text]; paint(); tell({}); });
      return make("span", { class: "mi-chip" }, [`${text} (${ids.length}) `, off]);
    });
    below.replaceChildren(
      make("p", {}, [`${pinned.size} pinned. `, name, button, " ", ...apart]),
      ...(lines.length ? [make("ul", { "aria-label": "links between groups" }, lines.map(([text, sum]) => make("li", {}, `${text} ${signed(sum)}`)))] : []));
  };

  function paint() {
    part = chosen_part(data, limits, pinned);
    const { at, borders, high } = places(data, part.shown);
    const strongest = Math.max(...part.links.map((link) => Math.abs(link[2])), 1e-9);
    const drawn = [...part.links].sort((a, b) => Math.abs(a[2]) - Math.abs(b[2])).slice(-MOST);
    const lines = drawn.map(([source, target, weight]) => {
      const [[a, b], [c, d]] = [at.get(source), at.get(target)], share = Math.abs(weight) / strongest;
      return draw_in("path", { d: `M ${a} ${b} L ${c} ${d}`, class: `mi-edge ${weight > 0 ? "mi-adds" : "mi-subtracts"}`,
        "data-source": source, "data-target": target, "stroke-width": 0.5 + 3.5 * share, opacity: 0.2 + 0.6 * share });
    });
    const frame = borders.slice(1, -1).map((x) => draw_in("path", { d: `M ${x} 0 V ${HEIGHT - BOTTOM}`, class: "mi-border" }));
    data.rows.forEach((name, row) => frame.push(draw_in("text", { x: 4, y: HEIGHT - BOTTOM - (row + 0.5) * high + 4 }, name)));
    data.tokens.forEach((token, c) => {
      const most_letters = Math.max(1, Math.floor((borders[c + 1] - borders[c]) / 7)), text = token.shown.trim() || token.shown;
      frame.push(draw_in("text", { x: (borders[c] + borders[c + 1]) / 2, y: HEIGHT - 8, "text-anchor": "middle" },
        text.length > most_letters ? `${text.slice(0, most_letters - 1)}…` : text));
    });
    order = [...part.shown].sort((a, b) => data.nodes[b].row - data.nodes[a].row || at.get(a)[0] - at.get(b)[0]);
    const rows = new Map(), labels = [], taken = [];
    items = order.map((i) => {
      const node = data.nodes[i], [x, y] = at.get(i), group = group_of(node.id);
      const r = node.kind === "logit" ? 8 : 4 + 7 * Math.sqrt(node.influence / most);
      const mark = draw_in("g", { role: "option", "aria-selected": "false", transform: `translate(${x} ${y})`,
        class: `mi-node mi-${node.kind}${pinned.has(node.id) ? " mi-pinned" : ""}`, "data-id": node.id,
        "aria-label": `${node.name} ${node.said}${group ? `, in ${group}` : ""}${pinned.has(node.id) ? ", pinned" : ""}` },
      [draw_in("path", SHAPES[node.kind](r)), draw_in("title", {}, node.name)]);
      mark.addEventListener("keydown", (event) => { if (event.key === "p") { toggle(i); go(order.indexOf(i)); } });
      rows.set(node.row, [...(rows.get(node.row) || []), mark]);
      return mark;
    });
    const by_influence = [...order].filter((i) => ["feature", "logit"].includes(data.nodes[i].kind))
      .sort((a, b) => (data.nodes[b].kind === "logit") - (data.nodes[a].kind === "logit") || data.nodes[b].influence - data.nodes[a].influence);
    for (const i of by_influence) {
      const [x, y] = at.get(i), text = group_of(data.nodes[i].id) || data.nodes[i].short, half = 2.8 * text.length;
      const middle = Math.min(Math.max(x, LEFT + half), WIDTH - half);
      if (taken.some(([a, b, h]) => Math.abs(a - middle) < half + h + 4 && Math.abs(b - y) < 12)) continue;
      taken.push([middle, y, half]);
      labels.push(draw_in("text", { x: middle, y: y - 12, "text-anchor": "middle", class: "mi-word", "aria-hidden": "true" }, text));
    }
    canvas.replaceChildren(...frame, ...lines, ...items, ...labels);
    go = roving(items, { rows: [...rows.values()], onMove: (k) => {
      show(order[k]);
      if (items[k] === document.activeElement) tell({ node: data.nodes[order[k]].id });
    } });
    const place = order.indexOf(selected);
    go(place < 0 ? 0 : place, false);
    summary();
  }

  const slider = (name, text) => {
    const input = make("input", { type: "range", min: 0.1, max: 1, step: 0.05, value: limits[name], "aria-label": text, "data-key": name });
    input.addEventListener("input", () => { limits[name] = Number(input.value); paint(); });
    return make("label", {}, [text, " ", input]);
  };
  const head = [slider("node", "nodes"), slider("edge", "edges")];
  if (data.live) {
    const input = make("input", { type: "text", "aria-label": "prompt", "data-key": "prompt", class: "mi-prompt", spellcheck: "false" });
    input.value = data.prompt;
    const changed = () => input.value !== state.prompt && tell({ prompt: input.value });
    input.addEventListener("change", changed);
    input.addEventListener("keydown", (event) => { if (event.key === "Enter") changed(); });
    head.unshift(make("label", {}, [make("span", {}, "prompt"), " ", input]));
  } else head.unshift(make("strong", {}, data.prompt));
  const message = make("p", { class: "mi-message", role: "alert" }, data.message);
  paint();
  const section = make("section", { "aria-label": data.label, class: "mi-graph" }, [
    make("div", { class: "mi-head" }, head), message,
    make("div", { class: "mi-beside" }, [canvas, card]), below]);
  section.addEventListener("told", ({ detail }) => {
    done.set(key_of(detail.nodes, detail.factor), detail);
    report();
  });
  return section;
}

export default widget(draw);
