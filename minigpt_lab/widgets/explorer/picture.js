// Three panels over one axis of ε (histogram, layer map, measured curve) and the bars beside the map.
// What a move changes is drawn on a layer of its own above the rest.

const LEFT = 46, RIGHT = 8, BINS = 140, AXIS = 18, TOP = 6;
const percent = (x) => `${(100 * x).toFixed(x > 0 && x < 0.0995 ? 1 : 0)} %`;
const short = (x) => (x === 0 ? "0" : x >= 1e-4 && x < 1e4 ? String(Number(x.toPrecision(3))) : x.toExponential(Number(x.toExponential(0)) === x ? 0 : 2));

class Panel {
  constructor(host, className) {
    this.box = element("div", { class: `lab-x-panel ${className}` }, host);
    this.layers = [0, 1].map(() => element("canvas", { "aria-hidden": "true" }, this.box));
  }

  /** Fit both layers to a size in CSS pixels. */
  fit(width, height) {
    this.width = width; this.height = height;
    const scale = window.devicePixelRatio || 1;
    Object.assign(this.box.style, { width: `${width}px`, height: `${height}px` });
    for (const canvas of this.layers) {
      canvas.width = Math.round(width * scale); canvas.height = Math.round(height * scale);
      canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
      canvas.getContext("2d").setTransform(scale, 0, 0, scale, 0, 0);
    }
  }

  start(layer) {
    const context = this.layers[layer].getContext("2d");
    context.clearRect(0, 0, this.width, this.height);
    context.font = "11px system-ui, sans-serif";
    return context;
  }
}

class Picture {
  constructor(host, counts) {
    this.counts = counts;
    this.host = host;
    this.histogram = new Panel(host, "lab-x-histogram");
    this.map = new Panel(host, "lab-x-map");
    this.bars = new Panel(host, "lab-x-bars");
    this.curve = new Panel(host, "lab-x-curve");
  }

  resize(width, narrow) {
    const beside = narrow ? 64 : 170, plot = Math.max(180, width - beside - 8);
    const tall = document.fullscreenElement ? Math.max(1, (window.innerHeight - 420) / 420) : 1;
    this.mapRows = Math.round(Math.min(Math.max(this.counts.layers * 8, 150), 240) * tall);
    this.histogram.fit(plot, Math.round(110 * tall) + AXIS);
    this.map.fit(plot, this.mapRows + AXIS + TOP);
    this.bars.fit(beside, this.mapRows + AXIS + TOP);
    this.curve.fit(plot, Math.round(130 * tall) + AXIS);
    this.narrow = narrow;
  }

  // ε to a place and back; zero has a slot left of the axis
  x(index) { return this.xLog(LOGS[index]); }
  xLog(log) {
    const [low, high] = this.range, span = this.map.width - LEFT - 14 - RIGHT;
    if (log === -Infinity) return LEFT + 5;
    return LEFT + 14 + span * Math.min(1, Math.max(0, (log - low) / (high - low)));
  }
  logAt(x) {
    const [low, high] = this.range, span = this.map.width - LEFT - 14 - RIGHT;
    return x < LEFT + 9 ? -Infinity : low + (high - low) * Math.min(1, Math.max(0, (x - LEFT - 14) / span));
  }
  indexAt(x) { const log = this.logAt(x); return log === -Infinity ? 0 : indexOf(10 ** log); }
  y(layer) { return TOP + ((layer + 0.5) / this.counts.layers) * this.mapRows; }
  layerAt(y) {
    return Math.min(this.counts.layers - 1, Math.max(0, Math.floor(((y - TOP) / this.mapRows) * this.counts.layers)));
  }

  colours() {
    const style = getComputedStyle(this.host);
    const get = (name) => style.getPropertyValue(`--lab-x-${name}`).trim();
    this.ink = get("ink"); this.faint = get("faint"); this.kept = get("kept"); this.gone = get("gone");
    this.second = get("second"); this.paper = get("paper");
    this.ramp = [get("ramp-low"), get("ramp-high")].map((text) => text.split(" ").map(Number));
  }

  /** All that does not move with ε. */
  background(state) {
    this.colours();
    this.range = this.counts.range(state.component);
    this.found = this.counts.bins(state.domain, state.component, BINS);
    this.drawHistogram(state); this.drawMap(state); this.drawCurve(state); this.drawBarsAxis(state);
  }

  axis(context, panel, words) {
    const [low, high] = this.range, y = panel.height - AXIS;
    context.strokeStyle = this.faint; context.fillStyle = this.ink; context.lineWidth = 1;
    context.beginPath(); context.moveTo(LEFT, y + 0.5); context.lineTo(panel.width - RIGHT, y + 0.5); context.stroke();
    context.textAlign = "center"; context.textBaseline = "top";
    if (words) context.fillText("0", LEFT + 5, y + 4);
    const fine = high - low < 2.2;
    let free = LEFT + 14;
    for (let power = Math.floor(low); power <= Math.ceil(high); power++)
      for (const digit of fine ? [1, 2, 5] : [1]) {
        const log = power + Math.log10(digit);
        if (log < low || log > high) continue;
        const x = this.xLog(log);
        context.beginPath(); context.moveTo(x, y); context.lineTo(x, y + 3); context.stroke();
        const text = short(Number(`${digit}e${power}`)), half = context.measureText(text).width / 2;
        if (words && x - half > free && x + half < panel.width) { context.fillText(text, x, y + 4); free = x + half + 6; }
      }
  }

  drawHistogram(state) {
    const panel = this.histogram, context = panel.start(0), { all, zeros } = this.found;
    const total = this.counts.below(state.domain, state.component, 0)[1];
    const base = panel.height - AXIS, top = Math.max(...all) || 1, height = base - TOP;
    this.barHeight = (v) => (height * Math.min(v, top)) / top;
    this.fillBars(context, all, this.kept);
    context.fillStyle = this.kept;
    context.fillRect(LEFT + 1, base - this.barHeight(zeros), 8, this.barHeight(zeros));
    context.fillStyle = this.ink; context.textBaseline = "top"; context.textAlign = "right";
    context.fillText(percent(top / total), LEFT - 4, TOP - 2);
    context.fillText("0", LEFT - 4, base - 10);
    if (zeros) {
      const words = `exactly 0: ${percent(zeros / total)}`;
      context.textAlign = "left"; context.strokeStyle = this.paper; context.lineWidth = 4;
      context.strokeText(words, LEFT + 13, TOP); context.fillText(words, LEFT + 13, TOP);
    }
    this.axis(context, panel, true);
  }

  fillBars(context, values, colour, { from = -Infinity, to = Infinity } = {}) {
    const base = this.histogram.height - AXIS, [low, high] = this.range;
    context.fillStyle = colour;
    values.forEach((value, i) => {
      if (!value) return;
      const a = this.xLog(Math.max(low + ((high - low) * i) / BINS, from));
      const b = this.xLog(Math.min(low + ((high - low) * (i + 1)) / BINS, to));
      if (b > a) context.fillRect(a, base - this.barHeight(value), Math.max(b - a - (b - a > 3 ? 0.6 : 0), 0.4), this.barHeight(value));
    });
  }

  drawMap(state) {
    const panel = this.map, context = panel.start(0), { layers } = this.found;
    context.fillStyle = this.ink; context.textBaseline = "middle";
    if (!layers.length) return; // the vocabulary has none
    const rows = Math.min(layers.length, this.mapRows); // more layers than rows: a row holds several
    const image = new ImageData(BINS, rows), sums = Array.from({ length: rows }, () => new Float64Array(BINS));
    const members = new Float64Array(rows);
    layers.forEach((row, l) => {
      const r = Math.floor((l / layers.length) * rows);
      members[r] += this.counts.facts.units.ffn[l];
      row.forEach((v, i) => { sums[r][i] += v; });
    });
    const shares = sums.map((row, r) => row.map((v) => v / members[r]));
    const top = Float64Array.from(shares.flatMap((row) => [...row])).sort()[Math.floor(0.995 * rows * BINS)] || 1;
    const [a, b] = this.ramp;
    shares.forEach((row, r) => row.forEach((v, i) => {
      const t = Math.sqrt(Math.min(1, v / top)), at = 4 * (r * BINS + i);
      for (let c = 0; c < 3; c++) image.data[at + c] = a[c] + t * (b[c] - a[c]);
      image.data[at + 3] = 255;
    }));
    const scratch = document.createElement("canvas");
    scratch.width = BINS; scratch.height = rows;
    scratch.getContext("2d").putImageData(image, 0, 0);
    const left = this.xLog(this.range[0]), right = this.xLog(this.range[1]);
    context.imageSmoothingEnabled = false;
    context.drawImage(scratch, left, TOP, right - left, this.mapRows);
    context.textAlign = "right";
    this.layerLabels((l, y) => context.fillText(l, LEFT - 6, y));
    context.save(); context.translate(10, TOP + this.mapRows / 2); context.rotate(-Math.PI / 2);
    context.textAlign = "center"; context.fillText("layer", 0, 0); context.restore();
    this.axis(context, panel, true);
  }

  layerLabels(draw) {
    const step = [1, 2, 5, 10, 20, 50, 100].find((s) => (s / this.counts.layers) * this.mapRows > 14) ?? 200;
    for (let l = 0; l < this.counts.layers; l += step) draw(l, this.y(l));
  }

  drawBarsAxis() {
    const panel = this.bars, context = panel.start(0), y = TOP + this.mapRows;
    context.strokeStyle = this.faint; context.fillStyle = this.ink;
    context.strokeRect(0.5, TOP + 0.5, panel.width - 2, this.mapRows);
    context.textBaseline = "top"; context.textAlign = "left"; context.fillText("0", 0, y + 4);
    context.textAlign = "right"; context.fillText("100 %", panel.width - 1, y + 4);
    if (!this.narrow) { context.textAlign = "center"; context.fillText("removed", panel.width / 2 - 8, y + 4); }
  }

  drawCurve(state) {
    const panel = this.curve, context = panel.start(0), base = panel.height - AXIS;
    const [low, high] = this.range, measured = state.rule === "share" ? [] : this.counts.points(state.domain, state.component);
    const inside = measured.filter(([e]) => e === 0 || (Math.log10(e) >= low && Math.log10(e) <= high));
    this.axis(context, panel, true);
    this.losses = inside.length > 0;
    context.textBaseline = "middle"; context.textAlign = "right";
    if (this.losses) {
      const top = Math.max(1.25, ...inside.map((p) => p[3] ?? p[1])) * 1.08, bottom = Math.min(0.97, ...inside.map((p) => p[2] ?? p[1])) * 0.98;
      this.yLoss = (v) => TOP + (base - TOP - 4) * (1 - Math.log(v / bottom) / Math.log(top / bottom));
    } else {
      const top = 1.02, bottom = 0;
      this.yLoss = (v) => TOP + (base - TOP - 2) * (1 - (v - bottom) / (top - bottom));
    }
    const ticks = this.losses ? [0.9, 1, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100, 1e3, 1e4, 1e6] : [0, 0.5, 1];
    let last = Infinity;
    for (const tick of ticks) {
      const y = this.yLoss(tick);
      if (y < TOP - 2 || y > base + 1 || last - y < 13 || (tick === 0.9 && this.yLoss(1) > y - 13)) continue;
      last = y;
      context.fillStyle = this.ink; context.fillText(this.losses ? `×${short(tick)}` : percent(tick), LEFT - 5, y);
      context.strokeStyle = this.faint; context.globalAlpha = tick === 1 ? 1 : 0.45;
      context.beginPath(); context.moveTo(LEFT, y); context.lineTo(panel.width - RIGHT, y); context.stroke(); context.globalAlpha = 1;
    }
    if (this.losses) this.drawLosses(context, inside);
    else this.drawSizes(context, state);
  }

  drawLosses(context, points) {
    context.strokeStyle = this.kept; context.fillStyle = this.kept; context.lineWidth = 1.5;
    context.setLineDash([4, 3]); context.beginPath();
    points.filter(([e]) => e > 0).forEach(([e, v], i) => context[i ? "lineTo" : "moveTo"](this.xLog(Math.log10(e)), this.yLoss(v)));
    context.stroke(); context.setLineDash([]);
    for (const [e, v, lowest, highest] of points) {
      const x = this.xLog(e > 0 ? Math.log10(e) : -Infinity);
      if (lowest !== null) { context.beginPath(); context.moveTo(x, this.yLoss(lowest)); context.lineTo(x, this.yLoss(highest)); context.stroke(); }
      context.beginPath(); context.arc(x, this.yLoss(v), 3.5, 0, 7); context.fill();
    }
    context.lineWidth = 1;
  }

  /** Without a sweep: the stored share of the model, which is exact everywhere. */
  drawSizes(context, state) {
    const { counts } = this, [low, high] = this.range;
    if (state.rule === "share") return;
    const shares = counts.get(`sizes/${state.domain}/${state.component}`, () =>
      Array.from({ length: BINS + 1 }, (_, i) => {
        const index = indexOf(10 ** (low + ((high - low) * i) / BINS));
        return counts.size({ ...state, index }).stored / counts.facts.dense;
      }));
    context.strokeStyle = this.kept; context.lineWidth = 1.5; context.beginPath();
    shares.forEach((v, i) => context[i ? "lineTo" : "moveTo"](this.xLog(low + ((high - low) * i) / BINS), this.yLoss(v)));
    context.stroke(); context.lineWidth = 1;
  }

  /** All that moves: ε, what it removes, the brush, the neuron under the cursor. */
  move(state, size, reading) {
    const x = this.x(state.index), absolute = state.rule !== "share";
    const histogram = this.histogram.start(1), map = this.map.start(1), curve = this.curve.start(1);
    if (absolute) {
      this.fillBars(histogram, this.found.all, this.gone, { to: LOGS[state.index] });
      if (this.found.zeros) histogram.fillRect(LEFT + 1, this.histogram.height - AXIS - this.barHeight(this.found.zeros), 8, this.barHeight(this.found.zeros));
      this.line(histogram, x, TOP - 4, this.histogram.height - AXIS);
      this.line(curve, x, TOP - 4, this.curve.height - AXIS);
    }
    if (this.found.layers.length) this.moveMap(map, state, x, absolute);
    this.moveBars(size);
    if (state.brush) this.moveBrush(histogram, map, curve, state);
    if (state.neuron) this.moveNeuron(histogram, map, state);
    if (absolute) this.moveReading(curve, x, reading, size);
  }

  line(context, x, top, bottom) {
    context.strokeStyle = this.paper; context.lineWidth = 4; context.beginPath(); context.moveTo(x, top); context.lineTo(x, bottom); context.stroke();
    context.strokeStyle = this.ink; context.lineWidth = 1.5; context.beginPath(); context.moveTo(x, top); context.lineTo(x, bottom); context.stroke();
  }

  moveMap(context, state, x, absolute) {
    const left = this.xLog(this.range[0]), { layers } = this.counts, tall = this.mapRows / layers;
    context.fillStyle = this.gone; context.globalAlpha = 0.38;
    if (absolute) { context.fillRect(left, TOP, Math.max(0, x - left), this.mapRows); context.globalAlpha = 1; this.line(context, x, TOP, TOP + this.mapRows); return; }
    const edges = Array.from({ length: layers }, (_, l) => this.x(this.counts.layerThreshold(state.domain, state.component, l, state.index)));
    edges.forEach((edge, l) => context.fillRect(left, TOP + l * tall, Math.max(0, edge - left), tall));
    context.globalAlpha = 1; context.strokeStyle = this.ink; context.lineWidth = 1.5; context.beginPath();
    edges.forEach((edge, l) => { const at = Math.max(edge, left); context.lineTo(at, TOP + l * tall); context.lineTo(at, TOP + (l + 1) * tall); });
    context.stroke();
  }

  moveBars(size) {
    const panel = this.bars, context = panel.start(1), { units } = this.counts.facts, span = panel.width - 2;
    const tall = this.mapRows / this.counts.layers;
    context.fillStyle = this.gone;
    size.removed.ffn.forEach((n, l) => context.fillRect(1, TOP + l * tall, (span * n) / units.ffn[l], Math.max(tall - (tall > 3 ? 1 : 0), 0.5)));
    context.fillStyle = this.second;
    size.removed.attention.forEach((n, l) => { if (n) context.fillRect(1, TOP + (l + 0.3) * tall, (span * n) / units.attention[l], Math.max(0.4 * tall, 1)); });
  }

  moveBrush(histogram, map, curve, { brush, domain, component }) {
    const [a, b] = [this.xLog(brush.from), this.xLog(brush.to)];
    for (const [context, panel] of [[histogram, this.histogram], [curve, this.curve]]) {
      context.fillStyle = this.ink; context.globalAlpha = 0.13; context.fillRect(a, 0, b - a, panel.height - AXIS); context.globalAlpha = 1;
    }
    if (!this.found.layers.length) return;
    const rows = this.counts.get(`brushed/${domain}/${component}/${brush.first}/${brush.last}`, () => {
      const sum = new Float64Array(BINS);
      for (let l = brush.first; l <= brush.last; l++) this.found.layers[l].forEach((v, i) => { sum[i] += v; });
      return sum;
    });
    if (component === "activation") this.fillBars(histogram, rows, this.ink, { from: brush.from, to: brush.to });
    const top = TOP + (brush.first / this.counts.layers) * this.mapRows, bottom = TOP + ((brush.last + 1) / this.counts.layers) * this.mapRows;
    map.strokeStyle = this.paper; map.lineWidth = 4; map.strokeRect(a, top, b - a, bottom - top);
    map.strokeStyle = this.ink; map.lineWidth = 1.5; map.setLineDash([5, 3]); map.strokeRect(a, top, b - a, bottom - top); map.setLineDash([]);
  }

  moveNeuron(histogram, map, { neuron, domain, component }) {
    if (!this.found.layers.length) return;
    const index = this.counts.layer(this.counts.channels(domain, component), "ffn", neuron.layer)[neuron.channel];
    const x = this.x(index), y = this.y(neuron.layer);
    for (const [width, colour] of [[4.5, this.paper], [2, this.ink]]) { map.strokeStyle = colour; map.lineWidth = width; map.beginPath(); map.arc(x, y, 6, 0, 7); map.stroke(); }
    const base = this.histogram.height - AXIS;
    histogram.fillStyle = this.ink; histogram.beginPath(); histogram.moveTo(x, base - 1); histogram.lineTo(x - 5, base + 8); histogram.lineTo(x + 5, base + 8); histogram.fill();
  }

  moveReading(context, x, reading, size) {
    const value = this.losses ? reading?.value : size.stored / this.counts.facts.dense;
    if (value === undefined) return;
    const y = this.yLoss(value), filled = !this.losses || reading.measured;
    context.beginPath(); context.moveTo(x, y - 7); context.lineTo(x + 7, y); context.lineTo(x, y + 7); context.lineTo(x - 7, y); context.closePath();
    context.fillStyle = filled ? this.gone : this.paper; context.fill();
    context.strokeStyle = this.ink; context.lineWidth = 1.5; context.stroke();
  }
}
