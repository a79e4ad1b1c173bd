import { make, roving, widget } from "./common.js";

// data: {label, lines: [{name, tokens: [{shown, spoken, value, said, colour, ink}]}], scale}
export function draw(data, choose) {
  const items = [], rows = [], all = [];
  const readout = make("p", { class: "mi-readout", "aria-hidden": "true" });
  const lines = data.lines.map((line, row) => {
    const options = line.tokens.map((token, place) => {
      const option = make("span", {
        role: "option", class: "mi-token", "aria-selected": "false",
        "aria-label": `${token.spoken}: ${token.said}`,
        style: `background-color:${token.colour};color:${token.ink}`,
      }, [make("bdi", {}, token.shown), make("small", { "aria-hidden": "true" }, token.short)]);
      items.push(option);
      all.push({ ...token, row, place });
      return option;
    });
    rows.push(options);
    const name = line.name || `line ${row + 1}`;
    const group = make("div", { role: "group", class: "mi-line", "aria-label": name }, options);
    if (line.name) group.prepend(make("span", { class: "mi-name", "aria-hidden": "true" }, line.name));
    return group;
  });
  const list = make("div", { role: "listbox", class: "mi-lines", "aria-label": data.label }, lines);
  const numbers = make("button", { type: "button", "aria-pressed": "false" }, "Show all numbers");
  numbers.addEventListener("click", () => {
    const on = list.classList.toggle("mi-numbers");
    numbers.setAttribute("aria-pressed", String(on));
  });
  const show = (index) => {
    const token = all[index];
    readout.replaceChildren(make("b", {}, make("bdi", {}, `“${token.shown}”`)), ` ${token.said}`);
  };
  if (items.length) {
    roving(items, { rows, onMove: (index) => {
      show(index);
      if (items[index] === document.activeElement) choose({ line: all[index].row, token: all[index].place });
    } });
    show(0);
  }
  const scale = make("span", { class: "mi-scale", role: "img", "aria-label": data.scale.said }, [
    data.scale.low,
    make("i", { style: `background:linear-gradient(to right, ${data.scale.colours.join(",")})` }),
    data.scale.high,
  ]);
  const head = make("div", { class: "mi-head" }, [make("strong", {}, data.label), scale, numbers]);
  return make("section", { "aria-label": data.label }, [head, list, readout]);
}

export default widget(draw);
