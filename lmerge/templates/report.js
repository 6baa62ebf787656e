"use strict";
for (const form of document.querySelectorAll("form.switch")) {
  const selects = [...form.querySelectorAll("select")];
  const figures = [...document.querySelectorAll("#" + form.dataset.shows + " figure")];
  const none = form.querySelector("output");
  const show = () => {
    let shown = 0;
    for (const figure of figures) {
      const fits = selects.every((select) => {
        const value = figure.dataset[select.name];
        return value === "*" || value === select.value;
      });
      figure.hidden = !fits;
      shown += fits;
    }
    none.textContent = shown ? "" : "Not measured for this choice.";
  };
  form.hidden = false;
  form.addEventListener("change", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
}
