import { make, roving, widget } from "./common.js";

// data: {label, start, latents: [{latent, density, mean, highest, name, score, link, top: [context],
// weak: [context], raises: [[token, v]], lowers, nearest: [[latent, cosine]]}]}
// context: {value, before, token, after, colour, ink}
const SHOWN = 200;
const PLACES = {
  "firing token": (one) => one.top.map((each) => each.token),
  "any context": (one) => one.top.map((each) => each.before + each.token + each.after),
  "raised token": (one) => one.raises.map(([token]) => token),
  "name or topic": (one) => [one.name],
};
const DENSITIES = {
  "any density": () => true,
  "dead": (one) => one.density === 0,
  "below 0.1 %": (one) => one.density > 0 && one.density < 0.001,
  "0.1 to 1 %": (one) => one.density >= 0.001 && one.density < 0.01,
  "1 % or more": (one) => one.density >= 0.01,
};
const ORDERS = {
  "number": (one) => one.latent,
  "densest first": (one) => -one.density,
  "rarest first": (one) => one.density || Infinity,
  "highest value first": (one) => -one.highest,
  "best score first": (one) => one.score === null ? Infinity : -one.score,
};
const percent = (share) => `${(100 * share).toPrecision(2)} %`;

function contextLine(each) {
  const token = make("bdi", { class: "mi-fires", style: `background-color:${each.colour};color:${each.ink}` }, `[[${each.token}]]`);
  const value = make("span", { class: "mi-value" }, each.value === null ? "" : each.value.toFixed(1));
  return make("li", {}, [value, make("span", {}, [each.before, token, each.after])]);
}

function part(title, children) {
  return make("div", { class: "mi-part" }, [make("strong", {}, title), ...children]);
}

function card(one, go) {
  const tokens = (pairs) => make("span", { class: "mi-words" }, pairs.map(([token, value]) =>
    make("span", { title: value.toFixed(3) }, [make("bdi", {}, token), ` ${value.toFixed(2)}`])));
  const parts = [make("h4", {}, `latent ${one.latent}${one.name ? `: ${one.name}` : ""}`)];
  const facts = [`fires at ${percent(one.density)}`, `mean ${one.mean.toFixed(2)}`, `highest ${one.highest.toFixed(1)}`];
  if (one.score !== null) facts.push(`score ${one.score.toFixed(2)}`);
  parts.push(make("p", {}, facts.join(" · ")));
  if (one.link) parts.push(make("p", {}, make("a", { href: one.link, target: "_blank", rel: "noopener" }, `latent ${one.latent} elsewhere`)));
  if (one.raises.length) parts.push(part("raises", [tokens(one.raises)]));
  if (one.lowers.length) parts.push(part("lowers", [tokens(one.lowers)]));
  if (one.nearest.length) parts.push(part("nearest", one.nearest.map(([latent, cosine]) => {
    const button = make("button", { type: "button", "aria-label": `latent ${latent}, cosine ${cosine.toFixed(2)}` }, `${latent} (${cosine.toFixed(2)})`);
    button.addEventListener("click", () => go(latent));
    return button;
  })));
  const list = (title, contexts) => contexts.length ? [part(title, [make("ol", {}, contexts.map(contextLine))])] : [];
  parts.push(...list("where it fires most", one.top), ...list("at the weak end", one.weak));
  if (!one.top.length) parts.push(make("p", {}, "It never fires in this text."));
  return parts;
}

export function draw(data, choose) {
  const byNumber = new Map(data.latents.map((one) => [one.latent, one]));
  const state = { text: "", place: "firing token", density: "any density", order: "number" };
  const message = make("p", { class: "mi-message", role: "status" });
  const box = make("div", { class: "mi-list" });
  const side = make("div", { class: "mi-card", "aria-live": "polite", tabindex: "0", role: "region", "aria-label": "the latent" });
  const show = (latent) => {
    side.replaceChildren(...card(byNumber.get(latent), go));
    side.scrollTop = 0;
  };
  const go = (latent) => {
    if (!byNumber.has(latent)) return;
    show(latent);
    choose({ latent });
    side.focus();
  };
  const fits = (one) => {
    const text = state.text.trim().toLowerCase();
    if (/^\d+$/.test(text) && String(one.latent) === text) return true;
    return !text || PLACES[state.place](one).some((each) => {
      const said = each.toLowerCase();
      return state.place === "any context" || state.place === "name or topic" ? said.includes(text) : said.trim() === text;
    });
  };
  const list = (latent) => {
    const order = ORDERS[state.order];
    const found = data.latents.filter((one) => DENSITIES[state.density](one) && fits(one))
      .sort((a, b) => (order(a) - order(b)) || (a.latent - b.latent));
    const kept = found.slice(0, SHOWN);
    message.textContent = found.length > SHOWN ? `${found.length} latents, the first ${SHOWN} are shown`
      : found.length ? `${found.length} latents` : "No latent fits: search in another place, or for another word.";
    const items = kept.map((one) => {
      const top = one.top[0];
      const said = top ? `${top.before.slice(-24)}[[${top.token}]]` : "never fires";
      const score = one.score === null ? "" : ` ${one.score.toFixed(2)}`;
      return make("div", { role: "option", class: "mi-latent", "aria-selected": "false",
        "aria-label": `latent ${one.latent}${one.name ? `, ${one.name}` : ""}, fires at ${percent(one.density)}, ${said}` },
        [make("b", {}, String(one.latent)), make("span", {}, percent(one.density)),
          make("bdi", {}, one.name ? `${one.name}${score}` : said)]);
    });
    box.replaceChildren(make("div", { role: "listbox", "aria-label": "latents found" }, items));
    const first = Math.max(0, kept.findIndex((one) => one.latent === latent));
    if (!kept.length) return;
    const move = roving(items, { columns: () => 1, onMove: () => {} });
    items.forEach((item, index) => {
      const pick = () => { show(kept[index].latent); if (item === document.activeElement) choose({ latent: kept[index].latent }); };
      item.addEventListener("focus", pick);
      item.addEventListener("click", pick);
    });
    if (first) move(first, false);
    show(kept[first].latent);
  };
  const pick = (name, label, options) => {
    const made = make("select", { "aria-label": label }, Object.keys(options).map((each) => make("option", { value: each }, each)));
    made.addEventListener("change", () => { state[name] = made.value; list(); });
    return made;
  };
  const input = make("input", { type: "search", "aria-label": "search", placeholder: "a token, a topic, a number", spellcheck: "false" });
  input.addEventListener("input", () => { state.text = input.value; list(); });
  const head = make("div", { class: "mi-head" }, [make("strong", {}, data.label), input,
    make("label", {}, ["in ", pick("place", "search in", PLACES)]), pick("density", "density", DENSITIES), pick("order", "order", ORDERS)]);
  list(data.start);
  return make("section", { "aria-label": data.label, class: "mi-latents" }, [head, message, make("div", { class: "mi-browse" }, [box, side])]);
}

export default widget(draw);
