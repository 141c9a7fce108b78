// The home page's figure: looks the chosen curve up in window.heroTable (hero-table.js) and moves the drawn one.
"use strict";
(() => {
  const table = window.heroTable, figure = document.querySelector(".hero-figure");
  if (!table || !figure) return;
  const names = ["alpha", "kappa", "beta2", "steps"], $ = (id) => document.getElementById("hero-" + id);
  const { width, height, left, right, top, bottom } = table.box;
  const x = (n) => left + (width - left - right) * Math.log10(n) / 4;
  const y = (v) => height - bottom - (height - top - bottom) * v;
  const number = (v) => v.toLocaleString("en-GB", { maximumFractionDigits: 3 });
  const draw = () => {
    const [i, j, k, n] = names.map((name) => +$(name).value);
    const curve = table.step[i][j][k].map((v) => v / 1000), kept = 1 - table.alpha[i], steps = table.steps[n], step = curve[n];
    $("curve").setAttribute("d", "M" + curve.map((v, s) => x(table.steps[s]).toFixed(1) + "," + y(v).toFixed(1)).join("L"));
    for (const end of ["y1", "y2"]) $("kept").setAttribute(end, y(kept));
    $("kept-label").setAttribute("y", y(kept) + 4);
    const last = y(curve[curve.length - 1]) + 4;
    $("curve-label").setAttribute("y", Math.max(top + 22, Math.abs(last - y(kept) - 4) < 16 ? y(kept) - 12 : last));
    $("dot").setAttribute("cx", x(steps)); $("dot").setAttribute("cy", y(step));
    $("now").setAttribute("x1", x(steps)); $("now").setAttribute("x2", x(steps)); $("now").setAttribute("y2", y(step));
    names.forEach((name, p) => {
      const value = number(table[name][[i, j, k, n][p]]);
      $(name).setAttribute("aria-valuetext", value);
      figure.querySelector(`output[for="hero-${name}"]`).textContent = value;
    });
    $("title").textContent = `Fed to both moments, an edit of ${number(table.alpha[i])} leaves ${step.toFixed(2)} of the protected step; ` +
      `${kept.toFixed(2)} was wanted`;
    $("readout").textContent = `After ${number(steps)} steps, ${+(steps * (1 - table.beta2[k])).toPrecision(3)} times the memory of Adam’s ` +
      `second moment, shared routing multiplies the learning rate by ${(step / kept).toFixed(2)}: the protected step is ${step.toFixed(2)} of the ` +
      `unprotected one. Decoupled routing keeps it at ${kept.toFixed(2)}.`;
  };
  names.forEach((name) => $(name).addEventListener("input", draw));
  figure.querySelector(".hero-sliders").hidden = false;
  draw();
})();
