// One step of a two-weight layer under each routing: the same formulas as dmr.book.diagrams.two_weight_steps, redrawn as the reader turns it.
"use strict";
(() => {
  const names = ["plain", "shared", "decoupled", "displacement"];
  // x: plain Adam's step; U at `angle` degrees; the second weight's gradients are `spread` times smaller. Returns each routing's step and what it
  // leaves of the protected part, root mean square over gradients.
  const steps = (alpha, angle, spread, x) => {
    const c = Math.cos(angle * Math.PI / 180), s = Math.sin(angle * Math.PI / 180), U = [c, s], d = [1, 1 / spread];
    const A = [[1 - alpha * c * c, -alpha * c * s], [-alpha * c * s, 1 - alpha * s * s]];
    const root = A.map((row) => Math.hypot(row[0] * d[0], row[1] * d[1]));
    const map = {
      plain: [[1, 0], [0, 1]],
      shared: A.map((row, i) => row.map((a, j) => a * d[j] / root[i])),
      decoupled: A.map((row, i) => row.map((a, j) => a * d[j] / d[i])),
      displacement: A,
    };
    return Object.fromEntries(names.map((name) => {
      const M = map[name];
      return [name, { u: M.map((row) => row[0] * x[0] + row[1] * x[1]),
        left: Math.hypot(U[0] * M[0][0] + U[1] * M[1][0], U[0] * M[0][1] + U[1] * M[1][1]) }];
    }));
  };
  globalThis.dmrSteps = steps;
  if (typeof document === "undefined") return;
  const figure = document.querySelector(".step-figure");
  if (!figure) return;
  const $ = (id) => document.getElementById("step-" + id), svg = figure.querySelector("svg");
  const { x: x0, y: y0, unit, bar } = JSON.parse(figure.dataset.box), two = (v) => v.toFixed(2);
  const read = () => ({ alpha: +$("alpha").value, angle: +$("angle").value, spread: 10 ** +$("spread").value, turn: +$("turn").value });
  const draw = () => {
    const { alpha, angle, spread, turn } = read(), t = turn * Math.PI / 180, found = steps(alpha, angle, spread, [Math.cos(t), Math.sin(t)]);
    for (const name of names) {
      const [a, b] = found[name].u, left = found[name].left;
      $(name).setAttribute("x2", x0 + unit * a); $(name).setAttribute("y2", y0 - unit * b);
      $(name + "-bar").setAttribute("width", bar * Math.min(left, 2)); $(name + "-left").textContent = two(left);
    }
    $("handle").setAttribute("cx", x0 + unit * Math.cos(t)); $("handle").setAttribute("cy", y0 - unit * Math.sin(t));
    $("line").setAttribute("transform", `rotate(${-angle} ${x0} ${y0})`);
    const said = { alpha: alpha.toFixed(2), angle: angle + "°", spread: spread.toPrecision(2), turn: turn + "°" };
    for (const name in said) {
      $(name).setAttribute("aria-valuetext", said[name]);
      figure.querySelector(`output[for="step-${name}"]`).textContent = said[name];
    }
    $("title").textContent = `Of the protected step, shared routing leaves ${two(found.shared.left)}, decoupled ${two(found.decoupled.left)}, ` +
      `displacement ${two(found.displacement.left)}`;
  };
  const aim = (event) => {
    const box = svg.getBoundingClientRect(), k = svg.viewBox.baseVal.width / box.width;
    const turn = Math.atan2(y0 - (event.clientY - box.top) * k, (event.clientX - box.left) * k - x0) * 180 / Math.PI;
    $("turn").value = Math.round(turn); draw();
  };
  $("handle").addEventListener("pointerdown", (event) => { $("handle").setPointerCapture(event.pointerId); aim(event); event.preventDefault(); });
  $("handle").addEventListener("pointermove", (event) => { if ($("handle").hasPointerCapture(event.pointerId)) aim(event); });
  for (const name of ["alpha", "angle", "spread", "turn"]) $(name).addEventListener("input", draw);
  for (const button of figure.querySelectorAll("button")) button.addEventListener("click", () => {
    for (const [name, value] of Object.entries(JSON.parse(button.dataset.set))) $(name).value = value;
    draw();
  });
  figure.querySelector(".hero-sliders").hidden = figure.querySelector(".step-presets").hidden = false;
})();
