
export type Json = string | number | boolean | null | { [key: string]: Json | undefined } | Json[]

export type Database = {
  
  "public": {
          Tables: {
            "assets": {
                  Row: {
                    "created_at": string,"id": string,"image_url": string | null,"storage_bucket": string | null,"storage_path": string | null,"tagging_error": string | null,"tagging_eta": string | null,"tagging_progress": number | null,"tagging_result": Json | null,"tagging_stage": string | null,"tags": (string)[] | null,"workspace_id": string
                  }
                  ComputedFields: never
                  Insert: {
                    "created_at"?: string,"id"?: string,"image_url"?: string | null,"storage_bucket"?: string | null,"storage_path"?: string | null,"tagging_error"?: string | null,"tagging_eta"?: string | null,"tagging_progress"?: number | null,"tagging_result"?: Json | null,"tagging_stage"?: string | null,"tags"?: (string)[] | null,"workspace_id": string
                  }
                  Update: {
                    "created_at"?: string,"id"?: string,"image_url"?: string | null,"storage_bucket"?: string | null,"storage_path"?: string | null,"tagging_error"?: string | null,"tagging_eta"?: string | null,"tagging_progress"?: number | null,"tagging_result"?: Json | null,"tagging_stage"?: string | null,"tags"?: (string)[] | null,"workspace_id"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "assets_workspace_id_fkey"
      columns: ["workspace_id"]
isOneToOne: false
      referencedRelation: "workspaces"
      referencedColumns: ["id"]
    }
                  ]
                },"workspace_members": {
                  Row: {
                    "user_id": string,"workspace_id": string
                  }
                  ComputedFields: never
                  Insert: {
                    "user_id": string,"workspace_id": string
                  }
                  Update: {
                    "user_id"?: string,"workspace_id"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "workspace_members_workspace_id_fkey"
      columns: ["workspace_id"]
isOneToOne: false
      referencedRelation: "workspaces"
      referencedColumns: ["id"]
    }
                  ]
                },"workspaces": {
                  Row: {
                    "created_at": string,"id": string,"name": string
                  }
                  ComputedFields: never
                  Insert: {
                    "created_at"?: string,"id"?: string,"name": string
                  }
                  Update: {
                    "created_at"?: string,"id"?: string,"name"?: string
                  }
                  Relationships: [
                    
                  ]
                }
          }
          Views: {
            "workspace_rate_limits": {
                  Row: {
                    "admitted_at": (string)[],"max_requests": number | null,"max_units": number | null,"request_type": string,"requests": (number)[],"units": (number)[],"workspace_id": string
                  }
                  ComputedFields: never
                  Insert: {
                           "admitted_at"?: (string)[] | null,"max_requests"?: number | null,"max_units"?: number | null,"request_type"?: string | null,"requests"?: (number)[] | null,"units"?: (number)[] | null,"workspace_id"?: string | null
                         }
                        Update: {
                           "admitted_at"?: (string)[] | null,"max_requests"?: number | null,"max_units"?: number | null,"request_type"?: string | null,"requests"?: (number)[] | null,"units"?: (number)[] | null,"workspace_id"?: string | null
                         }
                        Relationships: [
                    
                  ]
                }
          }
          Functions: {
            "cancel_tagging":
{ Args: { "job_id": string }; Returns: Json
                           },
"check_rate_limit":
{ Args: { "image_count": number,"request_type": string,"workspace_id": string }; Returns: Record<string, unknown>
                           },
"edit_tagging_vocabulary":
{ Args: { "entries"?: Json,"removed"?: (string)[],"workspace_id": string }; Returns: Json
                           },
"enqueue_tagging":
{ Args: { "asset_ids": (string)[] }; Returns: Json
                           },
"openai_webhook":
{ Args: { "batch_id": string,"event_type": string,"webhook_id": string }; Returns: Json
                           },
"peek_rate_limit":
{ Args: { "image_count": number,"request_type": string,"workspace_id": string }; Returns: Record<string, unknown>
                           },
"retry_tagging":
{ Args: { "job_id": string }; Returns: Json
                           },
"set_tagging_profile":
{ Args: { "profile": Json,"workspace_id": string }; Returns: Json
                           },
"set_tagging_vocabulary":
{ Args: { "entries": Json,"workspace_id": string }; Returns: Json
                           },
"tagging_job":
{ Args: { "job_id": string }; Returns: Json
                           },
"tagging_profile":
{ Args: { "workspace_id": string }; Returns: Json
                           },
"tagging_strategy":
{ Args: { "image_count": number }; Returns: Json
                           },
"tagging_usage":
{ Args: { "since"?: string,"until"?: string,"workspace_id": string }; Returns: {
              "cache_write_tokens": number,"cached_tokens": number,"cost": number,"day": string,"images": number,"input_tokens": number,"model": string,"output_tokens": number,"reasoning_tokens": number,"requests": number,"service_tier": string,"user_id": string
            }[]
                           },
"tagging_vocabulary":
{ Args: { "workspace_id": string }; Returns: Json
                           }
          }
          Enums: {
            [_ in never]: never
          }
          CompositeTypes: {
            [_ in never]: never
          }
        }
}

type DatabaseWithoutInternals = Omit<Database, '__InternalSupabase'>

type DefaultSchema = DatabaseWithoutInternals[Extract<keyof Database, "public">]

export type Tables<
  DefaultSchemaTableNameOrOptions extends
    | keyof (DefaultSchema["Tables"] & DefaultSchema["Views"])
    | { schema: keyof DatabaseWithoutInternals },
  TableName extends DefaultSchemaTableNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof (DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"] &
        DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Views"])
    : never = never
> = DefaultSchemaTableNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? (DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"] &
      DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Views"])[TableName] extends {
      Row: infer R
    }
    ? R
    : never
  : DefaultSchemaTableNameOrOptions extends keyof (DefaultSchema["Tables"] & DefaultSchema["Views"])
  ? (DefaultSchema["Tables"] & DefaultSchema["Views"])[DefaultSchemaTableNameOrOptions] extends {
      Row: infer R
    }
    ? R
    : never
  : never

export type TablesInsert<
  DefaultSchemaTableNameOrOptions extends
    | keyof DefaultSchema["Tables"]
    | { schema: keyof DatabaseWithoutInternals },
  TableName extends DefaultSchemaTableNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"]
    : never = never
> = DefaultSchemaTableNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"][TableName] extends {
      Insert: infer I
    }
    ? I
    : never
  : DefaultSchemaTableNameOrOptions extends keyof DefaultSchema["Tables"]
  ? DefaultSchema["Tables"][DefaultSchemaTableNameOrOptions] extends {
      Insert: infer I
    }
    ? I
    : never
  : never

export type TablesUpdate<
  DefaultSchemaTableNameOrOptions extends
    | keyof DefaultSchema["Tables"]
    | { schema: keyof DatabaseWithoutInternals },
  TableName extends DefaultSchemaTableNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"]
    : never = never
> = DefaultSchemaTableNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"][TableName] extends {
      Update: infer U
    }
    ? U
    : never
  : DefaultSchemaTableNameOrOptions extends keyof DefaultSchema["Tables"]
  ? DefaultSchema["Tables"][DefaultSchemaTableNameOrOptions] extends {
      Update: infer U
    }
    ? U
    : never
  : never

export type Enums<
  DefaultSchemaEnumNameOrOptions extends
    | keyof DefaultSchema["Enums"]
    | { schema: keyof DatabaseWithoutInternals },
  EnumName extends DefaultSchemaEnumNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[DefaultSchemaEnumNameOrOptions["schema"]]["Enums"]
    : never = never
> = DefaultSchemaEnumNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? DatabaseWithoutInternals[DefaultSchemaEnumNameOrOptions["schema"]]["Enums"][EnumName]
  : DefaultSchemaEnumNameOrOptions extends keyof DefaultSchema["Enums"]
  ? DefaultSchema["Enums"][DefaultSchemaEnumNameOrOptions]
  : never

export type CompositeTypes<
  PublicCompositeTypeNameOrOptions extends
    | keyof DefaultSchema["CompositeTypes"]
    | { schema: keyof DatabaseWithoutInternals },
  CompositeTypeName extends PublicCompositeTypeNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[PublicCompositeTypeNameOrOptions["schema"]]["CompositeTypes"]
    : never = never
> = PublicCompositeTypeNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? DatabaseWithoutInternals[PublicCompositeTypeNameOrOptions["schema"]]["CompositeTypes"][CompositeTypeName]
  : PublicCompositeTypeNameOrOptions extends keyof DefaultSchema["CompositeTypes"]
  ? DefaultSchema["CompositeTypes"][PublicCompositeTypeNameOrOptions]
  : never

export const Constants = {
  "public": {
          Enums: {
            
          }
        }
} as const
