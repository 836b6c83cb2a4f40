/**
 * Makes of `fetch` a function to call at every change. It runs one fetch at a time: on a slow line, fetches that overtake or cancel each
 * other never end. What changes during a fetch goes into the next one; null stands for everything. The promise ends with the last of them.
 */
export function oneAtATime<Id>(fetch: (assetIds: Id[] | null) => Promise<unknown>): (assetIds: readonly Id[] | null) => Promise<void> {
  let changed: Set<Id> | null | undefined // undefined: nothing
  let running: Promise<void> | null = null

  async function run(): Promise<void> {
    try {
      while (changed !== undefined) {
        const now: Set<Id> | null = changed
        changed = undefined
        await fetch(now && [...now])
      }
    } finally {
      running = null
    }
  }

  return (assetIds) => {
    changed = assetIds && changed !== null ? new Set([...changed ?? [], ...assetIds]) : null
    return running ??= run()
  }
}
