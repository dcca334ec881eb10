"use strict";
// Each list of transcripts: what its controls leave, a few at a time. Without this script the whole list is there.
const PAGE = 6;

for (const section of document.querySelectorAll("[data-list]")) {
  const form = section.querySelector("form"), output = form.querySelector("output"), more = section.querySelector(".more");
  const items = [...section.querySelectorAll(".item")];
  const value = (name) => form.elements[name] ? form.elements[name].value : "";
  let shown = PAGE;

  const fits = ({ dataset }) =>
    (!value("run") || dataset.run === value("run")) &&
    (!value("place") || dataset.place === value("place")) &&
    (!value("tag") || dataset.tags.split(" ").includes(value("tag"))) &&
    (!value("least") || Number(dataset.length) >= Number(value("least"))) &&
    (!value("most") || Number(dataset.length) <= Number(value("most")));

  const show = () => {
    const left = items.filter(fits);
    for (const item of items) item.hidden = true;
    for (const item of left.slice(0, shown)) item.hidden = false;
    output.textContent = left.length ? `${Math.min(shown, left.length)} of ${left.length} shown` : "none fit";
    more.hidden = left.length <= shown;
  };

  const again = () => { shown = PAGE; show(); };
  form.addEventListener("input", again);
  form.addEventListener("reset", () => setTimeout(again));
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => { shown += PAGE; show(); });
  form.hidden = false;
  again();
}
