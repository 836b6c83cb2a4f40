import type { QueryClient, QueryKey } from '@tanstack/react-query'
import { AutotagError } from '../errors.js'
import type { Autotag } from '../index.js'
import type { Job, JobComplete, JobProgress } from '../types.js'
import { coalesce } from './shared.js'

/** An upload as messages tell it; the other fields are there once it was fetched. */
export type LiveJob = Pick<Job, 'job_id' | 'image_count' | 'completed' | 'failed' | 'progress' | 'eta'> & Partial<Job>

const ended = (job: LiveJob): boolean => Boolean(job.finished_at) || job.completed + job.failed >= job.image_count

/** What a message says of an upload. */
function told(message: JobProgress | JobComplete): Partial<LiveJob> & { job_id: string } {
  const { job_id, completed, failed, image_count, status } = message
  const rest = 'progress' in message ? { progress: message.progress, eta: message.eta } : { progress: 100, eta: null }
  return { job_id, completed, failed, image_count, ...status && { status }, ...rest }
}

/** A workspace's uploads that are not over, and those that have ended since. */
export class JobList {
  readonly #client: QueryClient
  readonly #queryKey: QueryKey
  readonly #autotag: Autotag
  #users = 0 // that have come and gone
  #stop: (() => void) | null = null
  readonly refresh = coalesce(async () => {
    await this.#client.fetchQuery({ queryKey: this.#queryKey, queryFn: () => this.load(), staleTime: 0 }).catch(() => undefined)
  })

  constructor(client: QueryClient, queryKey: QueryKey, autotag: Autotag) {
    this.#client = client
    this.#queryKey = queryKey
    this.#autotag = autotag
  }

  start(): void {
    this.#stop = this.#autotag.subscribe({
      onProgress: (message) => this.patch(told(message)),
      onJobComplete: (message) => this.patch({ ...told(message), finished_at: new Date().toISOString() }),
      onSync: () => { void this.refresh() },
      onUserChange: () => {
        this.#users++
        this.#client.setQueryData(this.#queryKey, [])
      },
    })
  }

  stop(): void { this.#stop?.() }

  async load(): Promise<LiveJob[]> {
    const before = this.#client.getQueryData<LiveJob[]>(this.#queryKey) ?? []
    const users = this.#users
    try {
      const live: LiveJob[] = await this.#autotag.jobs({ onlyLive: true })
      if (users !== this.#users) return await this.load() // these are the former user's
      const fetched = new Set(live.map((job) => job.job_id))
      return [...live, ...before.filter((job) => ended(job) && !fetched.has(job.job_id))]
    } catch (error) {
      if (error instanceof AutotagError && error.code === 'PGRST202') return before // an older server has no tagging_jobs
      throw error
    }
  }

  patch(change: Partial<LiveJob> & { job_id: string }): void {
    this.#client.setQueryData<LiveJob[]>(this.#queryKey, (jobs = []) => {
      const known = jobs.some((job) => job.job_id === change.job_id)
      if (known) return jobs.map((job) => job.job_id === change.job_id ? { ...job, ...change } : job)
      return [{ image_count: 0, completed: 0, failed: 0, progress: 0, eta: null, ...change }, ...jobs]
    })
  }
}

/** One upload. */
export class OneJob {
  readonly #client: QueryClient
  readonly #queryKey: QueryKey
  readonly #autotag: Autotag
  readonly #jobId: string
  #stop: (() => void) | null = null
  readonly refresh = coalesce(async () => {
    await this.#client.fetchQuery({ queryKey: this.#queryKey, queryFn: () => this.load(), staleTime: 0 }).catch(() => undefined)
  })

  constructor(client: QueryClient, queryKey: QueryKey, autotag: Autotag, jobId: string) {
    this.#client = client
    this.#queryKey = queryKey
    this.#autotag = autotag
    this.#jobId = jobId
  }

  load(): Promise<Job> { return this.#autotag.job(this.#jobId) }

  start(): void {
    this.#stop = this.#autotag.subscribe({
      onProgress: (message) => { if (message.job_id === this.#jobId) this.#patch(told(message)) },
      onJobComplete: (message) => {
        if (message.job_id !== this.#jobId) return
        this.#patch(told(message))
        void this.refresh()
      },
      onSync: () => { if (!this.#client.getQueryData<Job>(this.#queryKey)?.finished_at) void this.refresh() },
      onUserChange: () => { void this.#client.resetQueries({ queryKey: this.#queryKey, exact: true }) },
    })
  }

  stop(): void { this.#stop?.() }

  #patch(change: Partial<LiveJob>): void {
    this.#client.setQueryData<Job>(this.#queryKey, (job) => job && { ...job, ...change } as Job)
  }
}
