// Links to the sections that are left once the others have found nothing to show.
for (const heading of document.querySelectorAll("main section[id] > h2")) {
  at("contents").append(make("a", {href: "#" + heading.parentElement.id}, heading.dataset.short || heading.textContent));
}
