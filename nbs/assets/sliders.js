// Figures with sliders: each kind is one function from the sliders' values to a frame (title, what the sliders say, places of the moving parts), the
// same as in dmr.book.sliders, which draws the first frame. The tests compare the two.
"use strict";
(() => {
  const LEFT = 46, RIGHT = 300, TOP = 18, BASE = 256, two = (v) => v.toFixed(2), thousands = (n) => n.toLocaleString("en-GB");
  const across = (share) => LEFT + (RIGHT - LEFT) * share, up = (share) => BASE - (BASE - TOP) * share;
  const path = (points) => "M" + points.map(([x, y]) => x.toFixed(1) + "," + y.toFixed(1)).join("L");
  const grid = [...Array(51).keys()], short = (v) => String(+v.toPrecision(3));
  const apart = (ends, gap, lowest) => {
    const near = (i) => +ends[i].toFixed(3), order = ends.map((_, i) => i).sort((i, j) => near(i) - near(j) || i - j), at = [...ends];
    for (let k = 1; k < at.length; k++) at[order[k]] = Math.max(at[order[k]], at[order[k - 1]] + gap);
    for (const i of order.reverse()) { at[i] = Math.min(at[i], lowest); lowest = at[i] - gap; }
    return at;
  };
  const law = ({ alpha, kappa, beta2, steps }) => {
    const settled = (k) => 1 / Math.sqrt((1 - alpha * k) ** 2 + alpha ** 2 * (k - k * k)), memory = beta2 ** steps;
    const now = (k) => 1 / Math.sqrt(memory + (1 - memory) / settled(k) ** 2), height = (rate) => up(Math.log10(rate) / Math.log10(20));
    const curve = (rate) => path(grid.map((i) => 1 - (1 - i / 50) ** 2).map((k) => [across(k), height(rate(k))]));
    const scalar = 1 / (1 - alpha), here = now(kappa), x = across(kappa), [late, soon] = apart([height(settled(1)), height(now(1))], 17, BASE);
    return {
      title: `At κ = ${two(kappa)}, ${thousands(steps)} steps after the edit began, Adam’s rate is ${two(here)} times what it was; 1/(1 − α) says ${two(scalar)}`,
      said: { alpha: two(alpha), kappa: two(kappa), beta2: String(beta2), steps: thousands(steps) },
      parts: {
        settled: { d: curve(settled) }, now: { d: curve(now) }, scalar: { y1: height(scalar), y2: height(scalar) },
        "scalar-name": { y: height(scalar) - 6 }, "settled-name": { y: late + 4 }, "now-name": { y: soon + 4, text: `after ${thousands(steps)} steps` },
        drop: { x1: x, x2: x, y2: height(here) }, dot: { cx: x, cy: height(here) },
      },
    };
  };
  const left = (alpha, kappa) => {
    const a = alpha * (2 - alpha), adam = kappa === 1 ? 1 : (1 - alpha) / Math.sqrt(1 - a * kappa);
    const energy = (signal) => 2 / Math.PI * signal * 3 + 1 - 2 / Math.PI; // a third of the directions is protected
    return { "SGD": 1 - alpha, "Adam": adam, "Shampoo": Math.sqrt(adam),
      "signs, Lion": Math.sqrt(energy((1 - alpha) ** 2 * kappa / (1 - a * kappa)) / energy(kappa)), "Muon, exact": 1 };
  };
  const forgives = ({ alpha, kappa }) => {
    const here = left(alpha, kappa), names = Object.keys(here), x = across(alpha), labels = apart(names.map((name) => up(here[name])), 19, BASE);
    const parts = { drop: { x1: x, x2: x } };
    names.forEach((name, i) => {
      parts[`curve-${i}`] = { d: path(grid.map((k) => k * 0.99 / 50).map((a) => [across(a), up(left(a, kappa)[name])])) };
      parts[`dot-${i}`] = { cx: x, cy: up(here[name]) };
      parts[`name-${i}`] = { y: labels[i] + 4, text: `${name} ${two(here[name])}` };
    });
    return {
      title: `Of the protected step an edit of ${two(alpha)} leaves ${two(here.SGD)} under SGD, ${two(here.Adam)} under Adam, ` +
        `${two(here["signs, Lion"])} under signs (a third of the directions protected), 1.00 in Muon’s exact step`,
      said: { alpha: two(alpha), kappa: two(kappa) }, parts,
    };
  };
  const valleys = ({ weight, ratio }) => {
    const steep = ratio ** 0.5, flat = ratio ** -0.5, curves = [[steep, flat], [flat, steep]], x = (t) => 85 + 150 * t, y = (t) => 215 - 150 * t;
    const merged = (l) => curves[0].map((past, i) => l * curves[1][i] / ((1 - l) * past + l * curves[1][i]));
    const way = grid.slice(1, 50).map((k) => merged(k / 50)), parts = { way: { d: path([[0, 0], ...way, [1, 1]].map(([a, b]) => [x(a), y(b)])) } };
    curves.forEach((f, i) => [0.15, 0.5].forEach((level, j) => {
      const [rx, ry] = f.map((c) => 150 * Math.sqrt(2 * level / c));
      parts[`valley-${i}${j}`] = { rx, ry };
    }));
    const both = {};
    for (const [name, at] of [["plain", [weight, weight]], ["merge", merged(weight)]]) {
      const [past, fresh] = curves.map((f, k) => f.reduce((sum, c, i) => sum + 0.5 * c * (at[i] - k) ** 2, 0));
      both[name] = two(past + fresh);
      parts[name + "-dot"] = { cx: x(at[0]), cy: y(at[1]) };
      parts[name + "-past"] = { width: 26 * past };
      parts[name + "-new"] = { x: 312 + 26 * past, width: 26 * fresh };
      parts[name + "-loss"] = { text: both[name] };
    }
    return {
      title: `Simulated: averaged by curvature, both domains lose ${both.merge} together; the plain average loses ${both.plain}`,
      said: { weight: two(weight), ratio: short(ratio) }, parts,
    };
  };
  const descent = ({ alpha, angle, spread, turn }) => {
    const at = (degrees) => [Math.cos(degrees * Math.PI / 180), Math.sin(degrees * Math.PI / 180)], dot = (a, b) => a[0] * b[0] + a[1] * b[1];
    const x = at(turn), U = at(angle), cheap = [U[0], spread * U[1]], inside = alpha * dot(U, x), g = [x[0], x[1] / spread];
    const steps = { plain: x, displacement: x.map((v, i) => v - inside * U[i]), oblique: x.map((v, i) => v - inside * cheap[i] / dot(U, cheap)) };
    const parts = { line: { transform: `rotate(${-angle} 150 160)` }, handle: { cx: 150 + 115 * x[0], cy: 160 - 115 * x[1] } }, kept = {};
    for (const name in steps) {
      const u = steps[name], share = dot(g, u) / dot(g, x), bar = 70 * Math.min(Math.max(share, -0.5), 1.2);
      kept[name] = share;
      parts[name] = { x2: 150 + 115 * u[0], y2: 160 - 115 * u[1] };
      parts[name + "-bar"] = { x: 362 + Math.min(bar, 0), width: Math.abs(bar) };
      parts[name + "-kept"] = { text: two(share) };
    }
    return {
      title: `Displacement ${kept.displacement < 0 ? "climbs:" : "keeps"} ${two(kept.displacement).replace("-", "−")} of plain Adam’s descent ` +
        `on this gradient, the oblique step keeps ${two(kept.oblique)}`,
      said: { alpha: two(alpha), angle: angle + "°", spread: short(spread), turn: turn + "°" }, parts,
    };
  };
  const frames = globalThis.dmrFrames = { law, forgives, valleys, descent };
  if (typeof document === "undefined") return;
  for (const figure of document.querySelectorAll(".turn-figure")) {
    const inputs = [...figure.querySelectorAll("input")], listed = (input) => input.dataset.list && JSON.parse(input.dataset.list);
    const value = (input) => (listed(input) ? listed(input)[+input.value] : +input.value);
    const draw = () => {
      const { title, said, parts } = frames[figure.dataset.kind](Object.fromEntries(inputs.map((input) => [input.name, value(input)])));
      figure.querySelector(".figure-title").textContent = title;
      for (const input of inputs) {
        input.setAttribute("aria-valuetext", said[input.name]);
        figure.querySelector(`output[for="${input.id}"]`).textContent = said[input.name];
      }
      for (const part in parts) {
        const { text, ...places } = parts[part], element = figure.querySelector(`[data-part="${part}"]`);
        for (const name in places) element.setAttribute(name, places[name]);
        if (text !== undefined) element.textContent = text;
      }
    };
    for (const input of inputs) input.addEventListener("input", draw);
    for (const button of figure.querySelectorAll("button")) button.addEventListener("click", () => {
      const values = JSON.parse(button.dataset.set);
      for (const input of inputs) input.value = listed(input) ? listed(input).indexOf(values[input.name]) : values[input.name];
      draw();
    });
    for (const handle of figure.querySelectorAll("[data-drag]")) { // the pointer's angle about a centre turns the slider "turn"
      const svg = handle.ownerSVGElement, [x, y] = handle.dataset.drag.split(" ").map(Number), turn = inputs.find((input) => input.name === "turn");
      const aim = (event) => {
        const box = svg.getBoundingClientRect(), k = svg.viewBox.baseVal.width / box.width;
        turn.value = Math.round(Math.atan2(y - (event.clientY - box.top) * k, (event.clientX - box.left) * k - x) * 180 / Math.PI);
        draw();
      };
      handle.addEventListener("pointerdown", (event) => { handle.setPointerCapture(event.pointerId); aim(event); event.preventDefault(); });
      handle.addEventListener("pointermove", (event) => { if (handle.hasPointerCapture(event.pointerId)) aim(event); });
    }
    for (const hidden of figure.querySelectorAll(".hero-sliders, .step-presets")) hidden.hidden = false;
  }
})();
