// What every view uses. No request leaves the page, and text of a user only ever becomes a text node.

export function make(tag, attributes = {}, children = []) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...[children].flat());
  return node;
}

// Keys pressed inside `root` stay there: JupyterLab would cut the cell on x and leave it on an arrow.
// Lumino asks the focused element itself; Shift+Enter, Escape and keys with Ctrl, Alt or Meta go on.
export function keepKeys(root) {
  const onKey = (event) => {
    if (!(event.target instanceof Element) || !root.contains(event.target)) return;
    const goesOn = event.ctrlKey || event.metaKey || event.altKey || event.key === "Escape" ||
      (event.key === "Enter" && event.shiftKey);
    event.target.toggleAttribute("data-lm-suppress-shortcuts", !goesOn);
  };
  window.addEventListener("keydown", onKey, true);  // before JupyterLab, which listens on document
  return () => window.removeEventListener("keydown", onKey, true);
}

// One Tab stop for many items: arrows move among them, Home and End go to the first and last.
// `columns()` says how many items a row has; `rows` instead gives the items row by row.
export function roving(items, { columns, rows, onMove }) {
  let now = 0;
  const go = (index, focus = true) => {
    if (!(index >= 0 && index < items.length)) return;
    items[now].tabIndex = -1;
    items[now].setAttribute("aria-selected", "false");
    now = index;
    items[now].tabIndex = 0;
    items[now].setAttribute("aria-selected", "true");
    if (focus) items[now].focus();
    onMove(now);
  };
  const upDown = (step) => {
    if (!rows) return now + step * columns();
    const row = rows.findIndex((each) => each.includes(items[now]));
    const next = rows[row + step];
    return next?.length ? items.indexOf(next[Math.min(rows[row].indexOf(items[now]), next.length - 1)]) : -1;
  };
  items.forEach((item, index) => {
    item.tabIndex = index ? -1 : 0;
    item.addEventListener("focus", () => index !== now && go(index, false));
    item.addEventListener("click", () => go(index));
    item.addEventListener("pointerenter", () => onMove(index));
    item.addEventListener("pointerleave", () => onMove(now));
    item.addEventListener("keydown", (event) => {
      const to = {
        ArrowRight: () => now + 1, ArrowLeft: () => now - 1,
        ArrowDown: () => upDown(1), ArrowUp: () => upDown(-1),
        Home: () => 0, End: () => items.length - 1,
      }[event.key];
      if (!to || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      event.stopPropagation();
      go(to());
    });
  });
  return go;
}

// A view of `draw(data, choose) -> element`: drawn anew when its data change. What has the focus and a
// `data-key` has it afterwards, too. What Python tells besides (`told`) is an event of that element.
export function widget(draw) {
  return {
    render({ model, el }) {
      const choose = (what) => { model.set("chosen", what); model.save_changes(); };
      const redraw = () => {
        const key = el.querySelector(":focus")?.dataset.key;
        el.replaceChildren(draw(model.get("data"), choose));
        if (key) el.querySelector(`[data-key="${key}"]`)?.focus();
      };
      el.classList.add("mi-view");
      const tell = () => el.firstElementChild.dispatchEvent(new CustomEvent("told", { detail: model.get("told") }));
      model.on("change:data", redraw);
      model.on("change:told", tell);
      redraw();
      const release = keepKeys(el);
      return () => { release(); model.off("change:data", redraw); model.off("change:told", tell); };
    },
  };
}
