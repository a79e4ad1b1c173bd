import { make, roving, widget } from "./common.js";

// data: {label, tokens: [{shown, spoken}], heads: [{name, layer, head, rows}], columns, start}
// rows[i][j]: how much token i looks at token j, for j up to i.
const at = (head, from, to) => head.rows[from][to] ?? 0;

function paint(canvas, head, size, marked) {
  const count = head.rows.length;
  canvas.width = canvas.height = size * count;
  const brush = canvas.getContext("2d");
  brush.fillStyle = "#fff";
  brush.fillRect(0, 0, canvas.width, canvas.height);
  head.rows.forEach((row, from) => row.forEach((weight, to) => {
    brush.fillStyle = `rgba(0, 70, 130, ${weight})`;
    brush.fillRect(to * size, from * size, size, size);
  }));
  if (marked) {
    brush.strokeStyle = "#D55E00";
    brush.lineWidth = 2;
    const [x, y, w, h] = marked.map((each) => each * size);
    brush.strokeRect(x + 1, y + 1, w - 2, h - 2);
  }
}

export function draw(data, choose) {
  const { tokens, heads } = data, count = tokens.length;
  let head = data.start.head, token = data.start.token, backwards = false;
  const big = make("canvas", { class: "mi-big", "aria-hidden": "true" });
  const title = make("strong", { id: `mi-${crypto.randomUUID?.() ?? Math.random()}` });
  const readout = make("p", { class: "mi-readout", role: "status", "aria-live": "polite" });

  const weights = (of) => tokens.map((_, other) => backwards ? at(heads[head], other, of) : at(heads[head], of, other));
  const strongest = (of) => weights(of).map((weight, index) => [weight, index])
    .sort((a, b) => b[0] - a[0]).slice(0, 3).filter(([weight]) => weight >= 0.005)
    .map(([weight, index]) => `${tokens[index].spoken} (${index}) ${weight.toFixed(2)}`).join(", ");
  const verb = () => backwards ? "is looked at by" : "looks at";
  const sentence = (of) => `${tokens[of].spoken} (${of}) ${verb()} ${strongest(of) || "nothing"}`;

  const small = heads.map((each) => {
    const canvas = make("canvas", { "aria-hidden": "true" });
    paint(canvas, each, 1);
    return make("span", { role: "option", class: "mi-head-small", "aria-selected": "false",
      "aria-label": `layer ${each.layer}, head ${each.head}`, title: each.name }, canvas);
  });
  const grid = make("div", { role: "listbox", class: "mi-heads", "aria-label": "Heads: a row per layer",
    style: `grid-template-columns:repeat(${data.columns}, minmax(18px, 44px))` }, small);
  const words = tokens.map((each) => make("span", { role: "option", class: "mi-token",
    "aria-selected": "false" }, make("bdi", {}, each.shown)));
  const line = make("div", { role: "listbox", class: "mi-line", "aria-label": "Tokens" }, words);
  const turn = make("button", { type: "button", "aria-pressed": "false" }, "Is looked at by");
  const side = Math.max(2, Math.floor(300 / count));

  const update = () => {
    title.textContent = `Layer ${heads[head].layer}, head ${heads[head].head}`;
    const marked = backwards ? [token, 0, 1, count] : [0, token, count, 1];
    paint(big, heads[head], side, marked);
    weights(token).forEach((weight, index) => {
      words[index].style.backgroundColor = `color-mix(in srgb, #56B4E9 ${Math.round(100 * weight)}%, #fff)`;
      words[index].style.boxShadow = `inset 0 -${Math.round(6 * weight)}px #003a66`;
      words[index].setAttribute("aria-label", sentence(index));
      words[index].classList.toggle("mi-here", index === token);
    });
    small.forEach((each, index) => each.classList.toggle("mi-here", index === head));
    readout.textContent = sentence(token);
  };
  const tell = () => choose({ layer: heads[head].layer, head: heads[head].head, token });
  turn.addEventListener("click", () => {
    backwards = !backwards;
    turn.setAttribute("aria-pressed", String(backwards));
    update();
  });
  big.addEventListener("pointermove", (event) => {
    const box = big.getBoundingClientRect();
    const share = backwards ? (event.clientX - box.left) / box.width : (event.clientY - box.top) / box.height;
    token = Math.min(count - 1, Math.max(0, Math.floor(share * count)));
    update();
  });
  const moved = (items, set) => (index) => {
    set(index);
    update();
    if (items[index] === document.activeElement) tell();
  };
  const toHead = roving(small, { columns: () => data.columns, onMove: moved(small, (i) => { head = i; }) });
  const toToken = roving(words, { columns: () => count, onMove: moved(words, (i) => { token = i; }) });
  toHead(data.start.head, false);
  toToken(data.start.token, false);
  const large = make("div", { class: "mi-large", role: "group", "aria-labelledby": title.id },
    [make("div", { class: "mi-head" }, [title, turn]), big,
      make("div", { class: "mi-name" }, "a row looks at its columns; the darker, the more")]);
  return make("section", { "aria-label": data.label }, [
    make("div", { class: "mi-two" }, [grid, large]), line, readout]);
}

export default widget(draw);
