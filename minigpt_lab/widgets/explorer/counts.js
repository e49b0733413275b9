// What a threshold removes, counted from the arrays that Python packed (widgets/packing.py).
// Thresholds are indices into a list that both sides know: 0, then all numbers of three digits.

const LOWEST = -12, PER_DECADE = 900, DECADES = 19, THRESHOLDS = 1 + PER_DECADE * DECADES;

/** The threshold at an index: the same float64 that Python reads from its digits. */
function epsilonAt(index) {
  if (index <= 0) return 0;
  const decade = Math.floor((index - 1) / PER_DECADE);
  return Number(`${100 + ((index - 1) % PER_DECADE)}e${LOWEST + decade - 2}`);
}

/** Index of the threshold of three digits nearest to a number. */
function indexOf(epsilon) {
  if (!(epsilon > 0)) return 0;
  const [digits, power] = epsilon.toExponential(2).split("e").map(Number);
  const index = 1 + (power - LOWEST) * PER_DECADE + Math.round(digits * 100) - 100;
  return Math.min(Math.max(index, 1), THRESHOLDS - 1);
}

const LOGS = Float64Array.from({ length: THRESHOLDS + 1 }, (_, k) =>
  k === 0 ? -Infinity : k === THRESHOLDS ? LOWEST + DECADES : Math.log10(epsilonAt(k)));

/** Arrays by name, from deflated bytes; the high and low bytes of a number lie apart. */
async function unpack(facts, bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const raw = new Uint8Array(await new Response(stream).arrayBuffer());
  const arrays = {};
  for (const [name, [width, start, length, steps]] of Object.entries(facts.arrays)) {
    const Kind = { 1: Uint8Array, 2: Uint16Array, 4: Int32Array, 8: Float64Array }[width];
    const array = new Kind(length), bytesOf = new Uint8Array(array.buffer);
    for (let plane = 0; plane < width; plane++)
      for (let i = 0, from = start + plane * length; i < length; i++)
        bytesOf[i * width + plane] = raw[from + i];
    if (steps) for (let i = 1; i < length; i++) array[i] += array[i - 1];
    arrays[name] = array;
  }
  return arrays;
}

/** Number of entries of an ascending array that are at most a value. */
function atMost(sorted, value) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= value) low = middle + 1; else high = middle;
  }
  return low;
}

/** Counts and sizes of every plan of every domain; mirrors `contextual_plan` and `predicted_size`. */
class Counts {
  constructor(facts, arrays) {
    this.facts = facts;
    this.arrays = arrays;
    this.cache = new Map();
    this.starts = {};
    for (const [site, units] of Object.entries(facts.units)) {
      let total = 0;
      this.starts[site] = units.map((n) => (total += n) - n);
    }
    this.layers = facts.units.ffn.length;
    this.neurons = facts.units.ffn.reduce((a, b) => a + b, 0);
  }

  get(key, make) {
    if (!this.cache.has(key)) this.cache.set(key, make());
    return this.cache.get(key);
  }

  array(domain, name) { return this.arrays[`${domain}/${name}`]; }

  /** The array that holds a component's first threshold of every FFN channel. */
  channels(domain, component) {
    return this.array(domain, component === "activation" ? "activation" : "ffn");
  }

  /** One layer's part of a site's array. */
  layer(array, site, layer) {
    const start = this.starts[site][layer];
    return array.subarray(start, start + this.facts.units[site][layer]);
  }

  /** Thresholds of a layer's units, ascending. */
  sorted(domain, name, layer) {
    return this.get(`${domain}/${name}/${layer}`, () =>
      this.layer(this.array(domain, name), name === "attention" ? "attention" : "ffn", layer)
        .slice().sort());
  }

  /** Neurons (features, tokens) that a threshold prunes, and their number. */
  below(domain, component, index) {
    if (component === "activation") {
      let n = 0;
      for (let l = 0; l < this.layers; l++) n += atMost(this.sorted(domain, "activation", l), index);
      return [n, this.neurons];
    }
    const table = this.array(domain, component === "embedding" ? "tokens" : "features");
    return [table[index], component === "embedding" ? this.facts.vocabulary : this.facts.features];
  }

  /** Index of the smallest threshold that prunes a share of a component's neurons. */
  reaching(domain, component, share) {
    let low = 0, high = THRESHOLDS - 1;
    while (low < high) {
      const middle = (low + high) >> 1, [below, total] = this.below(domain, component, middle);
      if (below < share * total) low = middle + 1; else high = middle;
    }
    return low;
  }

  /** Units removed from every layer, by site. */
  removed({ domain, component, rule, index }) {
    const removed = {};
    for (const [site, units] of Object.entries(this.facts.units)) {
      const name = site === "ffn" && component === "activation" ? "activation" : site;
      removed[site] = units.map((n, layer) => {
        if (component === "embedding" || (component === "activation" && site !== "ffn")) return 0;
        let gone;
        if (rule !== "share") gone = atMost(this.sorted(domain, name, layer), index);
        else if (component === "activation") gone = Math.floor((index / 100) * n + 1e-9);
        else gone = this.array(domain, `${site}-shares`)[index * this.layers + layer];
        return Math.min(gone, n - 1);
      });
    }
    return removed;
  }

  /** Sizes of the pruned model: stored, non-zero, of the decoder's layers, and bytes. */
  size(state) {
    const { facts } = this, { domain, component, rule, index } = state;
    const removed = this.removed(state);
    let away = 0, zeroed = 0, tokens = 0;
    for (const [site, counts] of Object.entries(removed))
      counts.forEach((n, layer) => { away += n * facts.unit_parameters[site][layer]; });
    if (component === "linear" || component === "all")
      zeroed = this.array(domain, rule === "share" ? "zeroed-shares" : "zeroed")[index];
    if (component === "embedding") tokens = this.array(domain, "removed-tokens")[index];
    if (component === "all") tokens = this.array(domain, "removed-tokens")[0];
    const stored = facts.dense - away - tokens * facts.token_parameters;
    return {
      removed, tokens, stored, nonzero: stored - zeroed, layers: facts.layers_dense - away,
      bytes: stored * facts.bytes_per_parameter,
    };
  }

  /** The loss of a sweep at a threshold: measured, interpolated in logs, or null. */
  reading({ domain, component, rule, index }) {
    const points = this.points(domain, component), epsilon = epsilonAt(index);
    if (rule === "share" || !points.length) return null;
    const close = points.find(([e]) => Math.abs(e - epsilon) <= 1e-9 * epsilon);
    if (close) return { measured: true, value: close[1], low: close[2], high: close[3] };
    const next = points.findIndex(([e]) => e > epsilon);
    if (next < 1 || points[next - 1][0] === 0) return null; // 0 has no place on a log axis
    const [[a, p], [b, q]] = [points[next - 1], points[next]];
    const t = Math.log(epsilon / a) / Math.log(b / a);
    return { measured: false, value: Math.exp((1 - t) * Math.log(p) + t * Math.log(q)), a, b };
  }

  points(domain, component) { return this.facts.domains[domain].sweep[component] ?? []; }

  /** Smallest and largest logarithm that a component's picture shows, the same for all domains. */
  range(component) {
    return this.get(`range/${component}`, () => {
      let low = Infinity, high = -Infinity;
      const take = (index) => {
        if (index < 1 || index >= THRESHOLDS) return;
        low = Math.min(low, LOGS[index]); high = Math.max(high, LOGS[index]);
      };
      this.facts.domains.forEach((_, domain) => {
        if (component === "activation") this.array(domain, "activation").forEach(take);
        else {
          const table = this.array(domain, component === "embedding" ? "tokens" : "features");
          for (let k = 1; k < table.length; k++) if (table[k] > table[k - 1]) take(k);
        }
      });
      if (low > high) [low, high] = [-6, 0];
      // a few neurons lie far above all others: the last bin holds the highest thousandth
      if (component !== "embedding") high = Math.min(high, Math.max(...this.facts.domains.map((_, domain) => LOGS[this.reaching(domain, component, 0.999)])));
      this.facts.domains.forEach((_, domain) => {
        for (const [epsilon] of this.points(domain, component))
          if (epsilon > 0 && Math.log10(epsilon) < low && Math.log10(epsilon) > low - 0.5)
            low = Math.log10(epsilon);
      });
      return [Math.max(low - 0.06, high - 8), high + 0.06];
    });
  }

  /** Number of a component's neurons in every bin of the picture, by layer where it has layers. */
  bins(domain, component, n) {
    return this.get(`bins/${domain}/${component}/${n}`, () => {
      const [low, high] = this.range(component);
      const bin = (k) => Math.min(n - 1, Math.max(0, Math.floor(((LOGS[k] - low) / (high - low)) * n)));
      const all = new Float64Array(n), layers = [];
      let zeros = 0;
      if (component !== "embedding") {
        const codes = this.channels(domain, component);
        for (let l = 0; l < this.layers; l++) {
          const row = new Float64Array(n);
          for (const k of this.layer(codes, "ffn", l)) if (k > 0) row[bin(k)]++;
          layers.push(row);
        }
      }
      if (component === "activation") {
        for (const row of layers) row.forEach((v, i) => { all[i] += v; });
        zeros = this.below(domain, component, 0)[0];
      } else {
        const table = this.array(domain, component === "embedding" ? "tokens" : "features");
        zeros = table[0];
        for (let k = 1; k < table.length; k++)
          if (table[k] > table[k - 1]) all[bin(k)] += table[k] - table[k - 1];
      }
      return { all, layers, zeros };
    });
  }

  /** Threshold index of a layer at a share: that of its last pruned channel. */
  layerThreshold(domain, component, layer, index) {
    const name = component === "activation" ? "activation" : "ffn";
    const sorted = this.sorted(domain, name, layer);
    const n = this.removed({ domain, component, rule: "share", index }).ffn[layer];
    return n ? sorted[n - 1] : 0;
  }
}
