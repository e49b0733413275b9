// Controls, their state, and the two ways onto a page: as a widget (anywidget) and without a kernel.

function element(tag, attributes = {}, parent = null, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  parent?.append(made);
  return made;
}

const COMPONENTS = {
  activation: ["FFN channels, by activation", "neurons", "mean |activation|"],
  linear: ["all linear layers, attention too", "inputs and outputs", "mean |input|, |output|"],
  embedding: ["vocabulary", "tokens", "share of the domain's tokens"],
  all: ["all of it, and unseen tokens", "inputs and outputs", "mean |input|, |output|"],
};
const MAP_TITLES = {
  activation: ["Layers", "the stronger the colour, the more FFN channels of that mean |activation|"],
  linear: ["Layers", "FFN channels by the ε that removes them"],
  embedding: ["Layers", ""],
  all: ["Layers", "FFN channels by the ε that removes them"],
};
const integers = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const exact = (n) => integers.format(n);
const bytes = (n) => (n >= 1e9 ? `${(n / 1e9).toFixed(2)} GB` : n >= 1e6 ? `${(n / 1e6).toFixed(1)} MB` : `${(n / 1e3).toFixed(0)} kB`);
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

class Explorer {
  /**
   * @param root where to draw
   * @param facts, arrays what Python packed
   * @param state domain, component, rule, index
   * @param options changed(state): called after a move; link(state): a text to copy; label and hint of its button
   */
  constructor(root, facts, arrays, state, options) {
    Object.assign(this, { root, facts, options, id: `lab-x-${Math.random().toString(36).slice(2)}`, kept: {} });
    this.counts = new Counts(facts, arrays);
    this.passages = passagesOf(this.counts, arrays);
    this.state = { ...state, neuron: null, brush: null };
    root.classList.add("lab-x", "mathjax_ignore", "tex2jax_ignore");
    root.setAttribute("role", "region");
    root.setAttribute("aria-label", "Explorer of the threshold ε");
    root.replaceChildren();
    this.buildControls(); this.buildNumbers(); this.buildPicture(); this.buildCard();
    this.listen();
    this.theme();
    this.set({}, { tell: false });
  }

  buildControls() {
    const { root, facts, id } = this;
    const row = element("div", { class: "lab-x-controls" }, root);
    const select = (name, choices, words) => {
      const label = element("label", {}, row, words);
      const box = element("select", { name, "aria-label": words }, label);
      choices.forEach(([value, text]) => element("option", { value }, box, text));
      return box;
    };
    this.domain = select("domain", facts.domains.map((d, i) => [i, d.name]), "domain");
    this.component = select("component", facts.components.map((c) => [c, COMPONENTS[c][0]]), "prune");
    const rules = element("fieldset", {}, row, element("legend", { class: "lab-x-hidden" }, null, "rule"));
    this.rules = [["epsilon", "one ε"], ["share", "share of each layer"]].map(([value, text]) => {
      const radio = element("input", { type: "radio", name: `${id}-rule`, value });
      element("label", {}, rules, radio, text);
      return radio;
    });
    const push = element("span", { class: "lab-x-push" }, row);
    this.copy = element("button", { type: "button", title: this.options.hint }, push, this.options.label);
    this.full = element("button", { type: "button", "aria-pressed": "false", title: "Escape leaves full screen" }, push, "full screen");
    const threshold = element("div", { class: "lab-x-threshold" }, root);
    this.name = element("label", { for: `${id}-typed` }, threshold, "ε");
    this.typed = element("input", { type: "text", id: `${id}-typed`, inputmode: "decimal", autocomplete: "off" }, threshold);
    this.slider = element("input", { type: "range", step: "any", "aria-label": "threshold, on a log scale" }, threshold);
  }

  buildNumbers() {
    const list = element("div", { class: "lab-x-sizes", role: "list" }, this.root);
    this.sizes = Object.fromEntries(
      [["stored", "stored parameters"], ["nonzero", "non-zero parameters"], ["layers", "of the decoder's layers"],
       ["bytes", `on disk, as ${this.facts.dtype}`]].map(([key, words]) => {
        const box = element("div", { role: "listitem" }, list, element("span", { class: "lab-x-what" }, null, words));
        const value = element("b"), number = element("span", { class: "lab-x-number" }), fill = element("i");
        element("div", { "data-size": key }, box, value, " ", number);
        element("span", { class: "lab-x-bar", "aria-hidden": "true" }, box, fill);
        return [key, { value, number, fill }];
      }));
    this.words = element("p", { class: "lab-x-words" }, this.root);
    this.live = element("div", { class: "lab-x-hidden", "aria-live": "polite" }, this.root);
  }

  buildPicture() {
    const host = (this.grid = element("div", { class: "lab-x-picture" }, this.root));
    this.titles = ["", "lab-x-of-map", "lab-x-of-curve"].map((more) => element("p", { class: `lab-x-title ${more}` }));
    this.picture = new Picture(host, this.counts);
    const { histogram, map, bars, curve } = this.picture;
    this.domains = element("div", { class: "lab-x-side" });
    this.loss = element("div", { class: "lab-x-side" });
    host.append(this.titles[0], histogram.box, this.domains, this.titles[1], map.box, bars.box, this.titles[2], curve.box, this.loss);
    const label = (panel, words) => {
      panel.box.setAttribute("tabindex", "0"); panel.box.setAttribute("role", "group"); panel.box.setAttribute("aria-label", words);
    };
    label(map, "Layer map. Arrow keys: the neuron to look at. Shift and arrows: a brush. Enter: ε at this neuron. Escape: neither.");
    for (const [panel, words] of [[histogram, "Histogram"], [curve, "Curve"], [bars, "Share of each layer that is removed"]]) {
      panel.box.setAttribute("role", "img"); panel.box.setAttribute("aria-label", words);
    }
    this.fewRows = element("p", { class: "lab-x-note" }, this.root);
    this.brushed = element("p", { class: "lab-x-note", "data-brush": "" }, this.root);
  }

  buildCard() {
    this.card = element("section", { class: "lab-x-card", "aria-label": "Neuron under the cursor" }, this.root);
  }

  // ---- state ------------------------------------------------------------------------------------

  /** Change the state and draw once, in the next frame. */
  set(change, { tell = true } = {}) {
    const { state } = this, before = { ...state };
    const kept = `${state.component}/${state.rule}`;
    this.kept[kept] = state.index;
    Object.assign(state, change);
    if (state.component === "embedding") state.rule = "epsilon";
    if (!this.facts.components.includes(state.component)) state.component = this.facts.components[0];
    const now = `${state.component}/${state.rule}`;
    if (now !== kept && !("index" in change)) state.index = this.kept[now] ?? this.first();
    state.index = clamp(Math.round(state.index), 0, state.rule === "share" ? 99 : THRESHOLDS - 1);
    if (state.component !== before.component || state.rule !== before.rule) state.brush = null;
    if (!this.drawn || ["domain", "component", "rule"].some((key) => state[key] !== before[key])) this.whole = true;
    if (tell) this.told = true;
    if (!this.waiting) this.waiting = requestAnimationFrame(() => { this.waiting = null; this.draw(); });
  }

  /** Where a component starts that was not shown before: a tenth of its neurons at or below ε. */
  first() {
    const { domain, component, rule } = this.state;
    if (rule === "share") return 10;
    return component === "embedding" ? 0 : this.counts.reaching(domain, component, 0.1);
  }

  draw() {
    performance.mark("lab-explorer:begin");
    const { state, counts } = this, size = counts.size(state), reading = counts.reading(state);
    if (this.whole) this.layout();
    this.picture.move(state, size, reading);
    this.showControls(); this.showSizes(size); this.showWords(size, reading); this.showNeuron();
    this.drawn = true;
    const move = performance.measure(this.whole ? "lab-explorer:whole" : "lab-explorer:move", "lab-explorer:begin");
    this.whole = false;
    if (move) this.root.dataset.milliseconds = move.duration.toFixed(2);
    if (this.told) { this.told = false; this.options.changed?.(state); }
    clearTimeout(this.later);
    this.later = setTimeout(() => {
      this.live.textContent = this.words.textContent;
      for (const name of ["move", "whole"]) if (performance.getEntriesByName(`lab-explorer:${name}`).length > 2000) performance.clearMeasures(`lab-explorer:${name}`);
    }, 600);
  }

  /** Everything that depends on the page's width, the domain, the component or the colours. */
  layout() {
    const { state, facts, root } = this, width = root.clientWidth - 24;
    if (width <= 0) return;
    const narrow = width < 640;
    root.classList.toggle("lab-x-narrow", narrow);
    this.picture.resize(width, narrow);
    this.picture.background(state);
    const title = (at, bold, words) => this.titles[at].replaceChildren(bold, element("span", {}, null, words ? ` · ${words}` : ""));
    const [, what, unit] = COMPONENTS[state.component], total = this.counts.below(state.domain, state.component, 0)[1];
    const orange = state.rule === "share" ? "" : "; orange: pruned"; // a share has no one ε, so no colour here
    title(0, `${exact(total)} ${what}`, `${unit}${orange}${facts.domains.length > 1 ? "; one scale for all domains" : ""}`);
    title(1, ...MAP_TITLES[state.component]);
    if (this.picture.losses) title(2, "Perplexity ÷ dense", "● measured, with 95 % interval; dashed: interpolated");
    else title(2, "Stored share of the model", "");
    this.grid.classList.toggle("lab-x-mapless", state.component === "embedding");
    this.grid.classList.toggle("lab-x-curveless", state.rule === "share");
    const rows = this.picture.mapRows;
    this.fewRows.textContent = this.counts.layers > rows ? `The map has ${rows} rows for ${this.counts.layers} layers: a row shows up to ${Math.ceil(this.counts.layers / rows)} of them together.` : "";
    this.fewRows.hidden = !this.fewRows.textContent;
  }

  showControls() {
    const { state } = this, share = state.rule === "share", [low, high] = this.counts.range(state.component);
    this.domain.value = state.domain; this.component.value = state.component;
    this.rules.forEach((radio) => { radio.checked = radio.value === state.rule; radio.disabled = state.component === "embedding"; });
    this.name.textContent = share ? "share" : "ε";
    const text = share ? `${state.index} %` : short(epsilonAt(state.index));
    if (document.activeElement !== this.typed) { this.typed.value = text; this.typed.removeAttribute("aria-invalid"); }
    this.typed.setAttribute("aria-label", share ? "share of each layer to prune, in percent" : "threshold ε");
    this.lowest = share ? 0 : low - 0.05;
    Object.assign(this.slider, { min: this.lowest, max: share ? 99 : high });
    const value = share ? state.index : state.index === 0 ? this.lowest : clamp(LOGS[state.index], low, high);
    if (Math.abs(this.slider.valueAsNumber - value) > 1e-9) this.slider.value = value;
    this.slider.setAttribute("aria-valuetext", share ? `${state.index} percent` : `ε = ${text}`);
  }

  showSizes(size) {
    const { facts } = this, shares = {
      stored: [size.stored, facts.dense], nonzero: [size.nonzero, facts.dense],
      layers: [size.layers, facts.layers_dense], bytes: [size.bytes, facts.dense * facts.bytes_per_parameter],
    };
    for (const [key, [value, dense]] of Object.entries(shares)) {
      const box = this.sizes[key];
      box.value.textContent = key === "bytes" ? bytes(value) : `${((100 * value) / dense).toFixed(1)} %`;
      box.number.textContent = key === "bytes" ? `of ${bytes(dense)}` : exact(value);
      box.fill.style.width = `${(100 * value) / dense}%`;
    }
  }

  showWords(size, reading) {
    const { state, facts, counts } = this, sum = (list) => list.reduce((a, b) => a + b, 0);
    const [, what] = COMPONENTS[state.component], share = state.rule === "share";
    const words = [];
    const [below, total] = counts.below(state.domain, state.component, state.index);
    words.push(share ? `The lowest ${state.index} % of each layer's ${state.component === "activation" ? "channels" : "inputs and outputs"}.`
      : `At or below ε = ${short(epsilonAt(state.index))}: ${exact(below)} of ${exact(total)} ${what} (${percent(below / total)}).`);
    const removed = [];
    if (state.component !== "embedding") removed.push(`${exact(sum(size.removed.ffn))} FFN channels`);
    if (["linear", "all"].includes(state.component)) removed.push(`${exact(sum(size.removed.attention))} ${facts.attention_unit}`);
    if (["embedding", "all"].includes(state.component)) removed.push(`${exact(size.tokens)} tokens`);
    words.push(`Removed: ${removed.join(", ")}.`);
    if (size.stored !== size.nonzero) words.push(`Zeroed in place: ${exact(size.stored - size.nonzero)} weights.`);
    this.words.textContent = words.join(" ");
    this.showDomains();
    this.showLoss(reading);
    this.picture.histogram.box.setAttribute("aria-label", `Histogram. ${words[0]}`);
    this.picture.bars.box.setAttribute("aria-label", `Share of each layer's FFN channels that is removed: ${counts.facts.units.ffn.map((n, l) => `layer ${l} ${percent(size.removed.ffn[l] / n)}`).join(", ")}`);
  }

  /** The same threshold in every domain. */
  showDomains() {
    const { state, facts, counts } = this, absolute = state.rule !== "share";
    this.domains.hidden = !absolute || facts.domains.length < 2;
    if (this.domains.hidden) return;
    if (this.domains.children.length !== 2) {
      element("b", {}, this.domains, "pruned at this ε in");
      this.others = rowsOf(this.domains, facts.domains.map((d) => d.name));
    }
    facts.domains.forEach((_, d) => {
      const [below, total] = counts.below(d, state.component, state.index);
      this.others[d].set(below / total, percent(below / total), d === state.domain);
    });
  }

  showLoss(reading) {
    const { state, facts } = this, name = facts.domains[state.domain].name;
    let words;
    if (state.rule === "share") words = this.picture.losses ? "Losses are measured at one ε for all layers." : "";
    else if (!this.picture.losses) words = `No loss was measured on ${name}: the curve is the model's size.`;
    else if (!reading) words = "The sweep says nothing about this ε.";
    else if (reading.measured) words = `×${reading.value.toFixed(3)}${reading.low === null ? ", measured on one passage" : ` [${reading.low.toFixed(3)}, ${reading.high.toFixed(3)}], measured`}`;
    else words = `×${reading.value.toFixed(2)}, interpolated between ε = ${short(reading.a)} and ${short(reading.b)}`;
    this.loss.textContent = words;
    this.picture.curve.box.setAttribute("aria-label", `${this.picture.losses ? "Perplexity over dense" : "Stored share"} against ε. ${words}`);
    if (!this.showBrush()) this.brushed.hidden = true;
  }

  showBrush() {
    const { brush, domain, component, index, rule } = this.state;
    if (!brush || component === "embedding") return false;
    const { counts } = this;
    const low = 10 ** brush.from, high = 10 ** brush.to;
    const [first, last] = [indexOf(low), indexOf(high)];
    let n = 0, gone = 0;
    for (let l = brush.first; l <= brush.last; l++) {
      const sorted = counts.sorted(domain, component === "activation" ? "activation" : "ffn", l);
      n += atMost(sorted, last) - atMost(sorted, first - 1);
      const cut = rule === "share" ? counts.layerThreshold(domain, component, l, index) : index;
      gone += Math.max(0, atMost(sorted, Math.min(cut, last)) - atMost(sorted, first - 1));
    }
    const layers = brush.first === brush.last ? `layer ${brush.first}` : `layers ${brush.first}–${brush.last}`;
    this.brushed.hidden = false;
    this.brushed.textContent = `Brush: ${exact(n)} channels from ${short(Number(low.toPrecision(3)))} to ${short(Number(high.toPrecision(3)))} in ${layers}, ${n ? percent(gone / n) : "none"} of them at or below the threshold. Escape or a double click clears it.`;
    return true;
  }

  // ---- the neuron under the cursor --------------------------------------------------------------

  showNeuron() {
    const { neuron, component, domain, index, rule } = this.state, { facts, counts } = this;
    const key = neuron && `${neuron.layer}/${neuron.channel}/${domain}`;
    if (component === "embedding" || !neuron) {
      const note = component === "embedding" ? "Tokens are removed by frequency; bytes, special tokens and all that a kept token is merged from are kept."
        : "Point at the layer map, or tab to it and use the arrow keys: which channel, how active it is in every domain, and what excites it. A click sets ε there; dragging selects a range.";
      if (this.shown !== note) this.card.replaceChildren(element("p", { class: "lab-x-note" }, null, note));
      this.shown = note;
      return;
    }
    const cut = rule === "share" ? counts.layerThreshold(domain, component, neuron.layer, index) : index;
    const pruned = counts.layer(counts.channels(domain, component), "ffn", neuron.layer)[neuron.channel] <= cut;
    if (this.shown !== key) {
      this.shown = key;
      this.heading = element("h4");
      const columns = element("div", { class: "lab-x-columns" });
      const left = element("div", {}, columns, element("p", { class: "lab-x-note" }, null, "mean |activation| in"));
      const rows = rowsOf(left, facts.domains.map((d) => d.name));
      const values = facts.domains.map((_, d) => epsilonAt(counts.layer(counts.array(d, "activation"), "ffn", neuron.layer)[neuron.channel]));
      const top = Math.max(...values) || 1;
      values.forEach((value, d) => rows[d].set(value / top, short(value), d === domain));
      this.showPassages(columns, neuron, domain);
      this.card.replaceChildren(this.heading, columns);
    }
    this.heading.textContent = `Layer ${neuron.layer}, channel ${neuron.channel}: ${pruned ? "removed" : "kept"}`;
  }

  /** Windows of the domain's text in which a channel's value was largest. */
  showPassages(columns, neuron, domain) {
    const passages = this.passages(domain, neuron), collected = this.facts.domains[domain].examples;
    const box = element("div", {}, columns);
    if (!passages.length) {
      element("p", { class: "lab-x-note" }, box, collected ? "No passage excites it." : "No passages: collect_statistics(…, examples=5) notes them, and the explorer's tokenizer makes them text.");
      return;
    }
    const few = passages.length < collected ? `; ${passages.length} of ${collected} noted fit on this page` : "";
    element("p", { class: "lab-x-note" }, box, `what excites it most in ${this.facts.domains[domain].name}${few}`);
    const list = element("ul", {}, box);
    for (const pieces of passages) element("li", {}, list, ...pieces.flatMap(([text, marked]) => (marked ? [text.match(/^\s*/)[0], element("mark", {}, null, text.trimStart() || text)] : [text])));
  }

  /** The channel of a layer that lies nearest to a place on the axis. */
  nearest(layer, log) {
    const codes = this.counts.layer(this.counts.channels(this.state.domain, this.state.component), "ffn", layer);
    let best = 0, distance = Infinity;
    codes.forEach((code, channel) => {
      const d = Math.abs((code === 0 ? this.picture.range[0] - 0.1 : LOGS[code]) - log);
      if (d < distance) { best = channel; distance = d; }
    });
    return { layer, channel: best };
  }

  /** Step through a layer's channels by their order, or to the same place in another layer. */
  step(across, down) {
    const { state, counts } = this;
    const neuron = state.neuron ?? this.nearest(0, LOGS[state.index]);
    if (!state.neuron) return neuron;
    const codes = counts.layer(counts.channels(state.domain, state.component), "ffn", neuron.layer);
    if (down) return this.nearest(clamp(neuron.layer + down, 0, counts.layers - 1), Math.max(LOGS[codes[neuron.channel]], this.picture.range[0]));
    const order = Array.from(codes.keys()).sort((a, b) => codes[a] - codes[b] || a - b);
    return { layer: neuron.layer, channel: order[clamp(order.indexOf(neuron.channel) + across, 0, order.length - 1)] };
  }

  // ---- mouse, keyboard, page --------------------------------------------------------------------

  listen() {
    this.domain.addEventListener("change", () => this.set({ domain: Number(this.domain.value) }));
    this.component.addEventListener("change", () => this.set({ component: this.component.value }));
    for (const radio of this.rules) radio.addEventListener("change", () => this.set({ rule: radio.value }));
    this.slider.addEventListener("input", () => {
      const value = this.slider.valueAsNumber, share = this.state.rule === "share";
      this.set({ index: share ? Math.round(value) : value <= this.lowest + 0.025 ? 0 : indexOf(10 ** value) });
    });
    this.slider.addEventListener("keydown", (event) => this.slide(event));
    this.typed.addEventListener("change", () => this.take());
    this.typed.addEventListener("keydown", (event) => { event.stopPropagation(); if (event.key === "Enter") { this.take(); event.preventDefault(); } });
    this.full.addEventListener("click", () => (document.fullscreenElement ? document.exitFullscreen() : this.root.requestFullscreen?.()));
    this.root.addEventListener("fullscreenchange", () => {
      const full = document.fullscreenElement === this.root;
      this.full.setAttribute("aria-pressed", String(full)); this.full.textContent = full ? "leave full screen" : "full screen"; this.whole = true; this.set({}, { tell: false });
    });
    this.copy.addEventListener("click", () => this.copyLink());
    for (const panel of [this.picture.histogram, this.picture.map, this.picture.curve]) this.point(panel);
    this.picture.map.box.addEventListener("keydown", (event) => this.walk(event));
    this.root.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return; // first the brush goes, then the neuron
      this.anchor = null;
      this.set(this.state.brush ? { brush: null } : { neuron: null }, { tell: false });
    });
    this.watcher = new ResizeObserver(() => {
      if (this.root.clientWidth !== this.seen) { this.seen = this.root.clientWidth; this.whole = true; this.set({}, { tell: false }); }
    });
    this.watcher.observe(this.root);
    const theme = () => { if (this.theme()) { this.whole = true; this.set({}, { tell: false }); } };
    this.themes = new MutationObserver(theme);
    for (const node of [document.documentElement, document.body]) this.themes.observe(node, { attributes: true });
    this.media = window.matchMedia("(prefers-color-scheme: dark)");
    this.media.addEventListener("change", theme);
    this.undo = () => { this.watcher.disconnect(); this.themes.disconnect(); this.media.removeEventListener("change", theme); };
  }

  /** Dark where the page around is dark; whether that changed. */
  theme() {
    let dark = false;
    for (let node = this.root.parentElement; node; node = node.parentElement ?? node.getRootNode().host) {
      const found = getComputedStyle(node).backgroundColor.match(/[\d.]+/g)?.map(Number);
      if (found && (found[3] ?? 1) > 0.5) { dark = 0.3 * found[0] + 0.6 * found[1] + 0.1 * found[2] < 128; break; }
      if (node === document.documentElement) dark = /dark/.test(getComputedStyle(node).colorScheme) && matchMedia("(prefers-color-scheme: dark)").matches;
    }
    const before = this.root.classList.contains("lab-x-dark");
    this.root.classList.toggle("lab-x-dark", dark);
    return before !== dark;
  }

  /** Steps of the slider: a fiftieth of a decade, a threshold of three digits with Shift. */
  slide(event) {
    const by = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10 }[event.key];
    if (!by) return;
    event.preventDefault(); event.stopPropagation();
    const { index, rule } = this.state;
    if (rule === "share" || event.shiftKey) this.set({ index: index + by });
    else if (index === 0) this.set({ index: by > 0 ? indexOf(10 ** this.counts.range(this.state.component)[0]) : 0 });
    else { const log = LOGS[index] + by / 50; this.set({ index: log < this.lowest ? 0 : indexOf(10 ** log) }); }
  }

  /** A typed threshold: a number, or a percentage. */
  take() {
    const text = this.typed.value.trim().replace(/%$/, ""), value = Number(text.replace(",", "."));
    const share = this.state.rule === "share";
    if (text === "" || !(value >= 0) || !(share ? value <= 99 : value < Infinity)) { this.typed.setAttribute("aria-invalid", "true"); return; }
    this.typed.removeAttribute("aria-invalid");
    this.set({ index: share ? Math.round(value) : indexOf(value) });
    if (document.activeElement === this.typed) requestAnimationFrame(() => { this.typed.value = share ? `${this.state.index} %` : short(epsilonAt(this.state.index)); });
  }

  /** Click: ε there. Drag near the line: ε with it. Drag elsewhere: a brush. Hover: a neuron. */
  point(panel) {
    const { box } = panel, map = panel === this.picture.map;
    const place = (event) => { const rect = box.getBoundingClientRect(); return [event.clientX - rect.left, event.clientY - rect.top]; };
    let drag = null;
    box.addEventListener("pointerdown", (event) => {
      if (event.button || !event.isPrimary) return;
      const [x, y] = place(event), near = this.state.rule !== "share" && Math.abs(x - this.picture.x(this.state.index)) < 7;
      drag = { x, y, line: near, moved: false };
      box.setPointerCapture(event.pointerId);
      if (map) box.focus({ preventScroll: true });
    });
    box.addEventListener("pointermove", (event) => {
      const [x, y] = place(event);
      if (!drag) { if (map && this.counts.layers && this.state.component !== "embedding") this.set({ neuron: this.nearest(this.picture.layerAt(y), Math.max(this.picture.logAt(x), this.picture.range[0] - 0.1)) }, { tell: false }); return; }
      drag.moved ||= Math.hypot(x - drag.x, y - drag.y) > 4;
      if (!drag.moved) return;
      if (drag.line) { this.set({ index: this.picture.indexAt(x) }); return; }
      if (this.state.component === "embedding") return;
      const [low] = this.picture.range, logs = [drag.x, x].map((at) => Math.max(this.picture.logAt(at), low)).sort((a, b) => a - b);
      const layers = map ? [drag.y, y].map((at) => this.picture.layerAt(at)).sort((a, b) => a - b) : [0, this.counts.layers - 1];
      this.set({ brush: { from: logs[0], to: logs[1], first: layers[0], last: layers[1] } }, { tell: false });
    });
    box.addEventListener("pointerup", (event) => {
      if (drag && !drag.moved && this.state.rule !== "share") this.set({ index: this.picture.indexAt(place(event)[0]) });
      drag = null;
    });
    box.addEventListener("pointercancel", () => { drag = null; });
    box.addEventListener("dblclick", () => this.set({ brush: null }, { tell: false }));
  }

  /** Keys on the layer map. */
  walk(event) {
    const by = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1], PageUp: [-50, 0], PageDown: [50, 0] }[event.key];
    const { state, counts } = this;
    if (state.component === "embedding") return;
    if (by) {
      event.preventDefault(); event.stopPropagation();
      const from = state.neuron ?? this.step(0, 0), neuron = this.step(...by), change = { neuron };
      if (event.shiftKey) {
        this.anchor ??= from;
        const codes = [this.anchor, neuron].map((n) => counts.layer(counts.channels(state.domain, state.component), "ffn", n.layer)[n.channel]);
        const logs = codes.map((code) => Math.max(LOGS[code], this.picture.range[0])).sort((a, b) => a - b);
        const layers = [this.anchor.layer, neuron.layer].sort((a, b) => a - b);
        change.brush = { from: logs[0], to: logs[1], first: layers[0], last: layers[1] };
      } else this.anchor = null;
      this.set(change, { tell: false });
    } else if (event.key === "Enter" && state.neuron && state.rule !== "share") {
      event.preventDefault(); event.stopPropagation();
      this.set({ index: counts.layer(counts.channels(state.domain, state.component), "ffn", state.neuron.layer)[state.neuron.channel] });
    }
  }

  async copyLink() {
    const text = this.options.link(this.state);
    try { await navigator.clipboard.writeText(text); } catch {
      const field = element("textarea", {}, this.root, text);
      field.select(); document.execCommand("copy"); field.remove();
    }
    this.copy.textContent = "copied";
    this.live.textContent = "copied";
    setTimeout(() => { this.copy.textContent = this.options.label; }, 1500);
  }
}

/** Rows of a name, a bar and a number. */
function rowsOf(parent, names) {
  const box = element("div", { class: "lab-x-rows" }, parent);
  return names.map((name) => {
    const label = element("span", { title: name }, box, name), fill = element("i");
    element("span", { class: "lab-x-bar", "aria-hidden": "true" }, box, fill);
    const number = element("em", {}, box);
    return { set(share, text, bold) {
      fill.style.width = `${100 * share}%`; number.textContent = text; label.style.fontWeight = bold ? "600" : "";
    } };
  });
}

// ---- the state as text: the part of an address behind # -------------------------------------------

function toHash(facts, state, place) {
  const threshold = state.rule === "share" ? { share: state.index / 100 } : { epsilon: epsilonAt(state.index) };
  return new URLSearchParams({ explorer: place, domain: facts.domains[state.domain].name, component: state.component, ...threshold }).toString();
}

function fromHash(facts, text, place) {
  const given = new URLSearchParams(text.replace(/^#/, ""));
  if (given.get("explorer") !== String(place)) return null;
  const domain = facts.domains.findIndex((d) => d.name === given.get("domain"));
  const share = given.has("share"), number = Number(given.get(share ? "share" : "epsilon"));
  if (domain < 0 || !facts.components.includes(given.get("component")) || !(number >= 0)) return null;
  return { domain, component: given.get("component"), rule: share ? "share" : "epsilon", index: share ? Math.round(100 * number) : indexOf(number) };
}

// ---- as a widget --------------------------------------------------------------------------------

function stateOf(model, facts) {
  const rule = model.get("rule");
  return {
    domain: facts.domains.findIndex((d) => d.name === model.get("domain")), component: model.get("component"), rule,
    index: rule === "share" ? Math.round(100 * model.get("share")) : indexOf(model.get("epsilon")),
  };
}

async function render({ model, el }) {
  const facts = JSON.parse(model.get("facts")), packed = model.get("arrays");
  const arrays = await unpack(facts, packed instanceof DataView ? new Uint8Array(packed.buffer, packed.byteOffset, packed.byteLength) : packed);
  let sending = null;
  const explorer = new Explorer(element("div", {}, el), facts, arrays, stateOf(model, facts), {
    label: "copy state",
    hint: "Copies what is chosen as #…: put it behind the address of this notebook's page on the site, and that page opens so",
    link: (state) => `#${toHash(facts, state, 0)}`,
    changed(state) {
      clearTimeout(sending);
      sending = setTimeout(() => {
        sending = null;
        model.set({ domain: facts.domains[state.domain].name, component: state.component, rule: state.rule,
          ...(state.rule === "share" ? { share: state.index / 100 } : { epsilon: epsilonAt(state.index) }) });
        model.save_changes();
      }, 60);
    },
  });
  const follow = () => { if (sending === null) explorer.set(stateOf(model, facts), { tell: false }); };
  for (const name of ["domain", "component", "rule", "epsilon", "share"]) model.on(`change:${name}`, follow);
  return () => { model.off(null, follow); explorer.undo(); };
}

/** A function of a domain and a channel: its passages as pieces of text, and whether each is marked. */
function passagesOf(counts, arrays) {
  if (!arrays.pieces) return () => [];
  const pieces = new TextDecoder().decode(arrays.pieces).split("\0");
  return (domain, { layer, channel }) => {
    const places = arrays[`${domain}/places`], read = arrays[`${domain}/read`], starts = arrays[`${domain}/starts`];
    if (!places) return [];
    const own = [];
    for (let at = counts.starts.ffn[layer] + channel; at < places.length; at += counts.neurons)
      if (places[at]) own.push(places[at] - 1);
    return own.map((place) => {
      const window = atMost(starts, place) - 1, end = starts[window + 1] ?? read.length;
      const from = Math.max(starts[window], place - 16), to = Math.min(end, place + 9), text = [];
      if (from > starts[window]) text.push(["… ", false]);
      for (let i = from; i < to; i++) text.push([pieces[read[i]], own.includes(i)]);
      if (to < end) text.push([" …", false]);
      return text;
    });
  };
}

// ---- on a page without a kernel -----------------------------------------------------------------

async function mountAll() {
  const places = [...document.querySelectorAll(".lab-explorer")];
  for (const [place, box] of places.entries()) {
    if (box.dataset.mounted || typeof DecompressionStream === "undefined") continue;
    box.dataset.mounted = "true";
    const read = (name) => box.querySelector(`script[data-part="${name}"]`)?.textContent;
    try {
      const facts = JSON.parse(read("facts")), start = JSON.parse(read("state"));
      const packed = Uint8Array.from(atob(read("arrays")), (c) => c.charCodeAt(0));
      const arrays = await unpack(facts, packed), linked = fromHash(facts, location.hash, place);
      const first = { ...start, index: start.rule === "share" ? Math.round(100 * start.share) : indexOf(start.epsilon) };
      const root = element("div", {}, null);
      let writing = null; // an address costs as much as a picture, and a browser takes only some in a time
      box.append(root);
      const explorer = new Explorer(root, facts, arrays, linked ?? first, {
        label: "copy link",
        hint: "Copies the address of this page with what is chosen",
        link: (state) => `${location.href.split("#")[0]}#${toHash(facts, state, place)}`,
        changed(state) {
          clearTimeout(writing);
          writing = setTimeout(() => history.replaceState(history.state, "", `#${toHash(facts, state, place)}`), 200);
        },
      });
      window.addEventListener("hashchange", () => { const to = fromHash(facts, location.hash, place); if (to) explorer.set(to, { tell: false }); });
      box.querySelector(".lab-explorer-still")?.remove();
      if (linked) box.scrollIntoView({ block: "center" });
    } catch (error) { box.querySelector(":scope > .lab-x")?.remove(); console.warn("the explorer's picture stays:", error); }
  }
}

export default { render };
