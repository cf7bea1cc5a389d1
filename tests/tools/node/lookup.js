// What Node finds. Reads names, one a line, and prints for each its addresses, separated by spaces, or the error.
//
//   node lookup.js lookup     dns.lookup, which http, net and most packages use: getaddrinfo of the C library
//   node lookup.js resolve    dns.resolve4 and dns.resolve6: c-ares
const dns = require("node:dns").promises;
const readline = require("node:readline");

const lookup = async (name) => (await dns.lookup(name, { all: true })).map(({ address }) => address);
const resolve = async (name) => {
  const found = await Promise.allSettled([dns.resolve4(name), dns.resolve6(name)]);
  const addresses = found.flatMap(({ value }) => value ?? []);
  if (addresses.length === 0) throw found[0].reason;
  return addresses;
};

(async () => {
  const find = { lookup, resolve }[process.argv[2]];
  for await (const name of readline.createInterface({ input: process.stdin })) {
    console.log(await find(name).then((all) => all.join(" "), (err) => `error: ${err.code}`));
  }
})();
