// pg-boss with undici: `fill EVENTS ENDPOINTS` or `work RECEIVER`; PostgreSQL comes from the PG* variables.
// Settings: four workers that fetch 500 jobs each and send them at once, polling as often as it allows (0.5 s).
// Run in a directory whose node_modules has pg-boss, pg and undici.
"use strict";
const load = require("node:module").createRequire(process.cwd() + "/");
const { createHmac } = require("node:crypto");
const { Pool: Database } = load("pg");
const Boss = load("pg-boss").PgBoss ?? load("pg-boss");
const { Pool } = load("undici");

const BODY = JSON.stringify({ type: "email.delivered", version: "1.0", data: { text: "x".repeat(520) } });
const pool = new Database({ max: 20 });
const db = { executeSql: (text, values) => pool.query(text, values) };

async function fill(events, endpoints) {
  const boss = new Boss({ db, supervise: false, schedule: false });
  await boss.start();
  await boss.createQueue("deliver");
  for (let at = 0; at < events; at += 1000) {
    const data = [];
    for (let n = at; n < Math.min(at + 1000, events); n++) data.push({ name: "deliver", data: { n, e: n % endpoints, body: BODY } });
    await boss.insert(data);
  }
  const { rows } = await pool.query("SELECT count(*) AS jobs FROM pgboss.job WHERE name = 'deliver'");
  console.log(rows[0].jobs);
  process.exit(0);
}

async function work(receiver) {
  const client = new Pool(`http://${receiver}`, { connections: 160, pipelining: 1 });
  const deliver = async ({ data: { n, e, body } }) => {
    const { statusCode, body: answer } = await client.request({
      method: "POST",
      path: `/e${String(e).padStart(5, "0")}`,
      headers: {
        "content-type": "application/json",
        "x-trackpost-signature": createHmac("sha256", "secret").update(body).digest("hex"),
        "webhook-id": `evt_${String(n).padStart(32, "0")}`,
      },
      body,
    });
    await answer.dump();
    if (statusCode >= 300) throw new Error(`answered ${statusCode}`);
  };
  const boss = new Boss({ db, supervise: false, schedule: false });
  boss.on("error", console.error);
  await boss.start();
  for (let worker = 0; worker < 4; worker++)
    await boss.work("deliver", { batchSize: 500, pollingIntervalSeconds: 0.5 }, (jobs) => Promise.all(jobs.map(deliver)));
}

const [command, ...rest] = process.argv.slice(2);
void (command === "fill" ? fill(Number(rest[0]), Number(rest[1])) : work(rest[0]));
