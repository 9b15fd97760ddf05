// Shows the document that describes the API. Everything is put in as text, never as HTML.
const make = (tag, text, ...children) => {
  const node = document.createElement(tag);
  if (text) node.textContent = text;
  node.append(...children);
  return node;
};
const named = (tag, name, text, ...children) => Object.assign(make(tag, text, ...children), { className: name });

const start = async () => {
  const doc = await (await fetch('/openapi.json')).json();
  const resolve = (schema) => (schema?.$ref ? doc.components.schemas[schema.$ref.split('/').pop()] : schema) ?? {};
  const typeOf = (schema) => {
    if (!schema) return '';
    if (schema.$ref) return schema.$ref.split('/').pop();
    const union = schema.oneOf ?? schema.anyOf;
    if (union) return union.map(typeOf).join(' or ');
    if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(' | ');
    if (schema.items) return `list of ${typeOf(schema.items)}`;
    return [schema.type].flat().join(' or ');
  };
  const fields = (schema, seen = []) => {
    const plain = resolve(schema);
    const parts = plain.allOf ? plain.allOf.map(resolve) : [plain];
    const rows = parts.flatMap((part) =>
      Object.entries(part.properties ?? {}).map(([name, field]) => {
        const must = part.required?.includes(name) ? '' : ' (optional)';
        return make('tr', '', make('td', '', make('code', name), named('span', 'hint', must)),
          make('td', typeOf(field)), make('td', field.description ?? resolve(field).description ?? ''));
      }));
    if (!rows.length) return [];
    const inner = parts.flatMap((part) => Object.values(part.properties ?? {}))
      .flatMap((field) => [field, field.items, ...(field.oneOf ?? [])]).filter((field) => field?.$ref && !seen.includes(field.$ref));
    const below = inner.flatMap((field) => {
      seen.push(field.$ref);
      const shown = fields(field, seen);
      return shown.length ? [make('h4', typeOf(field)), ...shown] : [];
    });
    return [make('table', '', ...rows), ...below];
  };
  const body = (title, content) => Object.entries(content ?? {}).flatMap(([kind, media]) =>
    [make('h3', `${title} (${kind})`), ...fields(media.schema, [])]);

  document.getElementById('title').textContent = `${doc.info.title} ${doc.info.version}`;
  document.getElementById('about').textContent = doc.info.description;
  const groups = new Map(doc.tags.map((tag) => [tag.name, make('section', '', make('h2', tag.name), make('p', tag.description))]));
  for (const [path, methods] of Object.entries(doc.paths)) {
    for (const [method, route] of Object.entries(methods)) {
      if (!route.responses) continue;
      const head = make('summary', '', named('span', 'method', method.toUpperCase()), make('code', path), named('span', 'hint', route.summary ?? ''));
      const rows = (route.parameters ?? []).map((parameter) => make('tr', '', make('td', '', make('code', parameter.name)),
        make('td', parameter.in), make('td', parameter.description ?? '')));
      const answers = Object.entries(route.responses).map(([status, answer]) => make('tr', '', make('td', status), make('td', answer.description)));
      const entry = make('details', '', head, make('p', route.description ?? ''));
      if (rows.length) entry.append(make('h3', 'Parameters'), make('table', '', ...rows));
      entry.append(...body('Request', route.requestBody?.content), make('h3', 'Answers'), make('table', '', ...answers));
      const good = Object.entries(route.responses).find(([status]) => status.startsWith('2'));
      if (good) entry.append(...body('Answer', good[1].content));
      entry.dataset.words = `${method} ${path} ${route.summary ?? ''}`.toLowerCase();
      groups.get(route.tags?.[0])?.append(entry);
    }
  }
  const main = document.getElementById('routes');
  main.replaceChildren(...groups.values());
  document.getElementById('find').addEventListener('input', (event) => {
    const wanted = event.target.value.toLowerCase();
    for (const entry of main.querySelectorAll('details')) entry.hidden = !entry.dataset.words.includes(wanted);
  });
};
start().catch((error) => { document.getElementById('routes').textContent = `The document could not be shown: ${error}`; });
