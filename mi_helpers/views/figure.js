import { keepKeys, make } from "./common.js";

// The picture of an explorer, its sentence above it, and the names that its controls lack.
function nameControls(box) {
  for (const control of box.querySelectorAll(".widget-inline-hbox")) {
    const label = control.querySelector(".widget-label")?.textContent?.trim();
    if (!label) continue;
    const handles = [...control.querySelectorAll('[role="slider"]')];
    const readout = control.querySelector(".widget-readout");
    handles.forEach((handle, index) => {
      const end = handles.length > 1 ? (index ? ", to" : ", from") : "";
      handle.setAttribute("aria-label", label + end);
      if (readout && handles.length === 1) handle.setAttribute("aria-valuetext", readout.textContent);
    });
    if (readout?.isContentEditable) {
      readout.setAttribute("role", "textbox");
      readout.setAttribute("aria-label", `${label}, as a number`);
    }
    for (const field of control.querySelectorAll("select, input, textarea, .widget-toggle-buttons"))
      if (!field.labels?.length) field.setAttribute("aria-label", label);
  }
}

export default {
  render({ model, el }) {
    const message = make("p", { class: "mi-message mathjax_ignore tex2jax_ignore", role: "status" });
    const image = make("img", {});
    let address = null;
    const draw = () => {
      URL.revokeObjectURL(address);
      address = URL.createObjectURL(new Blob([model.get("png")], { type: "image/png" }));
      image.src = address;
      image.alt = model.get("alt");
      image.width = model.get("width");
      image.style.maxHeight = `${model.get("tallest")}px`;
    };
    const say = () => {
      message.textContent = model.get("message");
      image.classList.toggle("mi-past", Boolean(model.get("message")));
    };
    model.on("change:png", draw);
    model.on("change:message", say);
    draw();
    say();
    el.classList.add("mi-view", "mi-figure");
    el.replaceChildren(message, image);
    let watch, release;
    const frame = requestAnimationFrame(() => {  // the explorer holds this element only after it
      const box = el.closest(".mi-explorer") ?? el;
      release = keepKeys(box);
      const name = () => nameControls(box);
      watch = new MutationObserver(name);
      watch.observe(box, { childList: true, subtree: true, characterData: true });
      name();
    });
    return () => {
      cancelAnimationFrame(frame);
      watch?.disconnect();
      release?.();
      URL.revokeObjectURL(address);
      model.off("change:png", draw);
      model.off("change:message", say);
    };
  },
};
